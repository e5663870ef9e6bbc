# Two stages: the first has pip and what it needs, the second has only what serving needs. No torch.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY maestro_core maestro_core
COPY server server
COPY benchmarks benchmarks
RUN python -m venv /opt/maestro \
 && /opt/maestro/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt . \
 && /opt/maestro/bin/pip uninstall --yes pip setuptools

FROM python:3.11-slim
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin maestro \
 && install --directory --owner=maestro /var/lib/maestro
COPY --from=build /opt/maestro /opt/maestro
ENV PATH=/opt/maestro/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MAESTRO_HOST=0.0.0.0 \
    MAESTRO_STATE_DIR=/var/lib/maestro
USER maestro
VOLUME /var/lib/maestro
EXPOSE 8000
# Ready only after calibration, so a first start is given time for it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('MAESTRO_PORT', '8000')}/v2/health/ready\", timeout=2)"]
CMD ["maestro", "serve"]
