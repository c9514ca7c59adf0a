# Two images: `docker build --target api .` (no torch) and `docker build --target worker .` (the default).
# The wheels of torch bring CUDA with them: the machine needs only NVIDIA's driver and container toolkit.

FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 \
    PATH=/opt/venv/bin:$PATH \
    DARKROOM_HOST=0.0.0.0 \
    DARKROOM_DATA_DIR=/tmp/darkroom
# A new volume takes its owner from the folder that it covers, so the folders for volumes belong to the user.
RUN groupadd --gid 10001 darkroom \
    && useradd --no-log-init --uid 10001 --gid 10001 --no-create-home --home-dir /tmp darkroom \
    && install --directory --owner darkroom --group darkroom /blobs /models
WORKDIR /app
# For both images. /livez, not /readyz: nobody should restart a process because Redis is away.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m CMD ["python", "-c", "from http.client import HTTPConnection; from os import environ; \
    connection = HTTPConnection('127.0.0.1', int(environ.get('DARKROOM_WORKER_PORT') or environ['DARKROOM_PORT']), 4); \
    connection.request('GET', '/livez'); raise SystemExit(connection.getresponse().status != 200)"]


FROM base AS packages
# Compiled here, once: a running container cannot write next to the sources.
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/venv
RUN pip install --no-cache-dir uv==0.13.9 && uv venv /opt/venv
COPY pyproject.toml requirements.lock torch.txt ./

# As constraints, the lock gives versions and hashes to just what an image needs, and leaves the test tools out.
# It fails closed: a package whose hash is not in the lock is an error. An editable install points at /app only if it finds
# a package there; the rest of the sources follows in the last stage.
FROM packages AS api-packages
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --require-hashes --constraints requirements.lock --requirements pyproject.toml
COPY README.md ./
COPY app/__init__.py app/
RUN uv pip install --no-deps --editable .

FROM packages AS worker-packages
# Unset: torch from PyPI, with CUDA. `--build-arg UV_TORCH_BACKEND=cpu` takes PyTorch's own CPU build, 3 GB less.
ARG UV_TORCH_BACKEND
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --constraints requirements.lock --requirements torch.txt \
    && uv pip install --require-hashes --constraints requirements.lock --excludes torch.txt \
        --requirements pyproject.toml --extra worker --extra language
COPY README.md ./
COPY app/__init__.py app/
RUN uv pip install --no-deps --editable .


FROM base AS api
COPY --from=api-packages /opt/venv /opt/venv
COPY models/__init__.py models/catalog.py models/weighting.py models/
COPY models/cards models/cards
COPY models/suites models/suites
COPY app app
COPY darkroom darkroom
RUN python -m compileall -q app darkroom models && darkroom --help >/dev/null && darkroom models >/dev/null
USER 10001:10001
ENV DARKROOM_PORT=8000
EXPOSE 8000
ENTRYPOINT ["darkroom"]
CMD ["api"]


FROM base AS worker
COPY --from=worker-packages /opt/venv /opt/venv
COPY models/weights models/weights
COPY models/*.py models/
COPY models/cards models/cards
COPY models/suites models/suites
COPY app app
COPY darkroom darkroom
COPY workers workers
RUN python -m compileall -q app darkroom models workers && darkroom --help >/dev/null
USER 10001:10001
# What comes from the Hugging Face hub is kept in /models: mount a volume there, or each container downloads its own.
ENV DARKROOM_WORKER_PORT=9100 \
    HF_HOME=/models
EXPOSE 9100
ENTRYPOINT ["darkroom"]
CMD ["worker"]
