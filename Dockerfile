# The server alone. Your model's code and weights come in by a volume:
#   docker build --tag sidelight .
#   docker run --read-only --tmpfs /tmp --publish 50051:50051 --volume ./mine:/models sidelight \
#     --model python:mine:factory --listen 0.0.0.0:50051 --plaintext
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ARG TORCH=2.13.0
WORKDIR /source
RUN python -m venv /opt/sidelight
ENV PATH=/opt/sidelight/bin:${PATH}
RUN python -m pip install --no-cache-dir "torch==${TORCH}"
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY client client
COPY server server
RUN python -m pip install --no-cache-dir --constraint constraints.txt ".[server]"

FROM ${BASE}
COPY --from=build /opt/sidelight /opt/sidelight
ENV PATH=/opt/sidelight/bin:${PATH} PYTHONPATH=/models PYTHONUNBUFFERED=1
RUN useradd --system --no-create-home --uid 10001 sidelight
USER 10001
WORKDIR /models
EXPOSE 50051
ENTRYPOINT ["sidelight-server"]
CMD ["--help"]
