# A node of a Ray cluster, as KubeRay starts it:  docker build -f deploy/docker/ray.Dockerfile -t baton:0.1.0-cuda-ray .
# On top of the image for GPUs, which must be there. KubeRay gives the command, and probes nodes by wget.
FROM baton:0.1.0-cuda
USER 0
RUN apt-get update \
 && apt-get install -y --no-install-recommends wget \
 && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /src/
RUN pip install --no-cache-dir -c /src/constraints.txt "ray[default]"
USER 10001:10001
ENTRYPOINT []
CMD ["ray", "--help"]
