# Sealed models and the program that opens them. A reader, such as the registry, sees no model; a change is refused.
#
#     docker build --tag my_model-unseal ../sealing
#     docker build --file sealed.Dockerfile --tag my_model-sealed ../sealing
# hadolint ignore=DL3006
FROM my_model-unseal

COPY sealed /srv/sealed
