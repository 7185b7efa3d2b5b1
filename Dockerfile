# The server alone. Your model's code and weights come in by a volume; deploy/README.md tells the rest:
#   docker build --tag sidelight .
#   docker run --read-only --publish 50051:50051 --volume ./mine:/models --env SIDELIGHT_LISTEN=0.0.0.0:50051 \
#     sidelight --model python:mine:factory --plaintext
ARG BASE=python:3.11-slim

# What Sidelight depends on: a layer of its own, which another version of Sidelight leaves as it is.
FROM ${BASE} AS dependencies
# "cpu", or a build for CUDA as PyTorch calls it; empty: the one that the package index has without a name.
ARG TORCH_BUILD=cpu
# Where pip finds that build, if its own configuration does not lead there.
ARG TORCH_INDEX=
# "server,hf" serves folders of Hugging Face's too; pyproject.toml has the others.
ARG EXTRAS=server
WORKDIR /source
RUN python -m venv /opt/sidelight
ENV PATH=/opt/sidelight/bin:${PATH}
COPY constraints.txt ./
RUN python -m pip install --no-cache-dir --no-compile --constraint constraints.txt \
    ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
    "$(grep '^torch==' constraints.txt)${TORCH_BUILD:++${TORCH_BUILD}}"
COPY pyproject.toml hatch_build.py README.md LICENSE ./
# Empty packages stand in for Sidelight's own, so that pip learns from pyproject.toml what they need. Then goes what a
# server never opens: tests, headers, the installer. pip would write the bytecode of all modules; the import, of those
# that are used.
RUN mkdir -p client/sidelight server/sidelight_server proto/sidelight/v1 \
    && touch client/sidelight/__init__.py server/sidelight_server/__init__.py \
    && python -m pip install --no-cache-dir --no-compile --constraint constraints.txt ".[${EXTRAS}]" \
    && python -m pip uninstall --yes sidelight \
    && site="$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")" && torch="${site}/torch" \
    && rm -rf "${torch}/include" "${torch}/test" "${torch}"/bin/test_* "${torch}"/bin/*Test "${torch}"/bin/protoc* \
    && find "${site}/sympy" "${site}/networkx" "${site}/numpy" -type d -name tests -prune -exec rm -rf {} + \
    && rm -rf "${site}"/pip* /opt/sidelight/bin/pip* \
    && python -c "import grpc.aio, grpc_health.v1.health_pb2_grpc, grpc_reflection.v1alpha.reflection, PIL.Image, \
    google.protobuf.json_format, prometheus_client, pydantic_settings, safetensors.torch, torch.export; PIL.Image.init()"

FROM ${BASE} AS package
WORKDIR /source
# At the place of the one above, for that is what the scripts' first line names.
RUN python -m venv /opt/sidelight
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY client client
COPY server server
COPY proto proto
RUN /opt/sidelight/bin/python -m pip install --no-cache-dir --no-deps --prefix /opt/package .

FROM ${BASE}
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="Sidelight" \
    org.opencontainers.image.description="The attribution sidecar: which pixels decided each prediction, over gRPC." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
RUN useradd --system --no-create-home --uid 10001 --user-group sidelight && mkdir /models
COPY --from=dependencies /opt/sidelight /opt/sidelight
COPY --from=package /opt/package /opt/sidelight
# Nothing is written: neither bytecode, which is there, nor anything else. The root may be read-only, without a /tmp.
ENV PATH=/opt/sidelight/bin:${PATH} PYTHONPATH=/models PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /models
EXPOSE 50051 9464
# Asks the first address of SIDELIGHT_LISTEN, or 127.0.0.1:50051.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["sidelight-server", "--check"]
ENTRYPOINT ["sidelight-server"]
CMD ["--help"]
