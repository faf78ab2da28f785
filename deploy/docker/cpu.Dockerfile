# Conductors and stores everywhere, and workers on CPUs:  docker build -f deploy/docker/cpu.Dockerfile -t baton:0.1.0-cpu .
# TORCH_INDEX=URL of PyTorch's index of CPU builds saves gigabytes.
FROM python:3.11.15-slim-bookworm AS build
ARG TORCH_INDEX=
# The compiler is for the native operations; it stays behind.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/baton
ENV PATH=/opt/baton/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# What changes seldom comes first, so that a change of the sources costs one layer.
COPY constraints.txt /src/
RUN pip install -c /src/constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY . /src
RUN pip install -c /src/constraints.txt "/src[nixl,redis,otel]"
# What nothing here loads, 400 MiB: test programs (of PyTorch's CPU builds alone), NIXL for CUDA 12 and for expert parallelism.
RUN pip uninstall --yes nixl-cu12 \
 && cd /opt/baton/lib/python3.11/site-packages \
 && rm -rf torch/test nixl_ep_cu13

FROM python:3.11.15-slim-bookworm
RUN groupadd --gid 10001 baton \
 && useradd --uid 10001 --gid baton --no-create-home --home-dir /tmp baton
COPY --from=build /opt/baton /opt/baton
ENV PATH=/opt/baton/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
USER 10001:10001
WORKDIR /tmp
# docker run baton:0.1.0-cpu conductor --host 0.0.0.0
ENTRYPOINT ["python", "-m"]
CMD ["conductor", "--help"]
