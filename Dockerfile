# The Shardbook server: docker build --tag shardbook-server:0.1.0 .
# With traces: add --build-arg EXTRAS=server,postgres,otel. What was checked, and what could not be: deploy/README.md.
FROM python:3.11-slim AS base

# ---------------------------------------------------------------- the wheel, and an environment with it
FROM base AS build
ARG EXTRAS=server,postgres
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# Wheels alone, in both steps: there is no compiler here, and none is missing.
COPY constraints-dev.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --only-binary=:all: --constraint constraints-dev.txt hatchling

COPY pyproject.toml README.md LICENSE ./
COPY client ./client
COPY server ./server
COPY migrations ./migrations
RUN python -m hatchling build --target wheel --directory /wheels

# By its path, not by its name: an index may know another package of this name.
# Without pip: what serves installs nothing.
RUN --mount=type=cache,target=/root/.cache/pip \
    set -- /wheels/shardbook-*.whl \
    && python -m venv --without-pip /opt/shardbook \
    && python -m pip --python /opt/shardbook/bin/python install \
        --only-binary=:all: --constraint constraints-dev.txt "$1[${EXTRAS}]"

# ---------------------------------------------------------------- what runs
FROM base
LABEL org.opencontainers.image.title="shardbook-server" \
      org.opencontainers.image.description="Metadata service for PyTorch distributed checkpoints" \
      org.opencontainers.image.licenses="Apache-2.0"

# The only folder it may write to, and only without SHARDBOOK_DATABASE_URL: the embedded database. Mount a volume there.
RUN groupadd --gid 10001 shardbook \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/shardbook --no-create-home --shell /usr/sbin/nologin shardbook \
    && install --directory --owner=10001 --group=10001 --mode=0750 /var/lib/shardbook

COPY --from=build /opt/shardbook /opt/shardbook

ENV PATH=/opt/shardbook/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/shardbook \
    XDG_DATA_HOME=/var/lib \
    SHARDBOOK_LISTEN=0.0.0.0:7070 \
    SHARDBOOK_HTTP_LISTEN=0.0.0.0:7071

# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/shardbook
EXPOSE 7070 7071
STOPSIGNAL SIGTERM
# http.client and not urllib, which would ask the proxy that Docker may hand to containers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 7071, timeout=4); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["shardbook-server"]
CMD ["serve"]
