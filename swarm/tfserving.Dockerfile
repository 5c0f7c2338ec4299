# TensorFlow Serving with its models and configuration in the image, because Swarm cannot mount a folder on every node.
#
#     docker build --file swarm/tfserving.Dockerfile --tag my_model-tfserving tfserving
FROM tensorflow/serving:2.21.0

COPY models.config monitoring.config /config/
COPY models /models

# The image's own user is root.
USER 10001:10001

# A real prediction; the image has bash and grep, but no curl, no wget and no Python.
HEALTHCHECK --interval=5s --timeout=5s --retries=5 --start-period=180s CMD ["bash", "-c", "\
exec 3<>/dev/tcp/127.0.0.1/8501 && \
printf 'POST /v1/models/my_model:predict HTTP/1.0\\r\\nContent-Type: application/json\\r\\nContent-Length: 55\\r\\n\\r\\n%s' \
'{\"instances\": [[13.82, 24.49, 0.1162, 0.1357, 0.2275]]}' >&3 && grep -q predictions <&3"]

ENTRYPOINT ["tensorflow_model_server"]
CMD ["--port=8500", "--rest_api_port=8501", "--model_config_file=/config/models.config", \
     "--allow_version_labels_for_unavailable_models=true", "--monitoring_config_file=/config/monitoring.config"]
