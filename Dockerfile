# Builds and holds Guard Ops with its CUDA kernels, next to a torch of the same CUDA version:
#
#     docker build -t guard-ops .
#     docker run --rm --gpus all guard-ops                        # guard-ops doctor
#     docker run --rm --gpus all -v "$PWD/benchmarks/results:/src/benchmarks/results" \
#         guard-ops make gpu-check PYTHON=python3                 # the results stay in your checkout
#     docker build --target wheel --output dist .                 # the wheel alone
#
# No GPU is needed to build. CUDA, the image and torch are of one CUDA version: docs/building.md says
# which torch is built with which, and where a build checks it.
ARG CUDA_IMAGE=13.0.2
FROM nvidia/cuda:${CUDA_IMAGE}-devel-ubuntu24.04 AS build

ARG CUDA=13.0
ARG TORCH=torch==2.13.0
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN pip install "$TORCH" "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"

WORKDIR /src
COPY . .
RUN GUARD_OPS_CUDA="$CUDA" pip wheel -v . --no-build-isolation --no-deps --wheel-dir /dist

FROM scratch AS wheel
COPY --from=build /dist/ /

# compute-sanitizer, which make gpu-check looks for, comes with the image.
FROM build AS final
RUN pip install /dist/*.whl numpy pytest pytest-benchmark rich
CMD ["guard-ops", "doctor"]
