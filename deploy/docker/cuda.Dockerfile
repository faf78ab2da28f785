# Workers on NVIDIA GPUs:  docker build -f deploy/docker/cuda.Dockerfile -t baton:0.1.0-cuda .
# The wheels of torch, Triton and NIXL bring CUDA's libraries; the driver comes from the node (NVIDIA's container toolkit).
FROM python:3.11.15-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/baton
ENV PATH=/opt/baton/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt /src/
RUN pip install -c /src/constraints.txt torch
COPY . /src
RUN pip install -c /src/constraints.txt "/src[nixl,cuda,redis,otel]"
# What nothing here loads, 300 MiB: NIXL for CUDA 12 and for expert parallelism.
RUN pip uninstall --yes nixl-cu12 \
 && rm -rf /opt/baton/lib/python3.11/site-packages/nixl_ep_cu13

FROM python:3.11.15-slim-bookworm
# Triton compiles a launcher for each kernel; libibverbs and its drivers are what UCX reaches RDMA devices by.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev libibverbs1 ibverbs-providers librdmacm1 \
 && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 baton \
 && useradd --uid 10001 --gid baton --no-create-home --home-dir /tmp baton
COPY --from=build /opt/baton /opt/baton
ENV PATH=/opt/baton/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["python", "-m"]
CMD ["prefill_worker", "--help"]
