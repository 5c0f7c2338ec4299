# Sealed models with what opens them. Whoever reads it, the registry too, sees no model; whoever changes it is refused.
#
#     docker build --tag my_model-unseal ../sealing
#     docker build --file sealed.Dockerfile --tag my_model-sealed ../sealing
# hadolint ignore=DL3006
FROM my_model-unseal

COPY sealed /srv/sealed
