# Two stages: the first installs what the lock files pin and compiles what every request runs, the
# second has only what serving needs: no compiler, no torch. Run it read-only, with one volume for
# the profiles (deploy/compose.yaml).
ARG BASE=python:3.11-slim
# The same Python, and a C compiler.
ARG BUILD_BASE=python:3.11
FROM ${BUILD_BASE} AS build
WORKDIR /src
COPY deploy/requirements.lock deploy/build.lock ./
RUN python -m venv /opt/maestro && python -m venv /opt/build \
 && /opt/maestro/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock \
 && /opt/build/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r build.lock \
 && echo /opt/maestro/lib/python3.*/site-packages >"$(echo /opt/build/lib/python3.*/site-packages)/types.pth"
COPY pyproject.toml README.md LICENSE ./
COPY maestro_core maestro_core
COPY server server
COPY benchmarks benchmarks
RUN HATCH_BUILD_HOOKS_ENABLE=1 LDFLAGS=-s \
    /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
 && /opt/maestro/bin/pip install --no-cache-dir --no-deps --disable-pip-version-check dist/*.whl \
 && /opt/maestro/bin/pip uninstall --yes pip setuptools \
 && cd /opt/maestro/lib/python3.*/site-packages \
 && rm -r onnxruntime/tools onnxruntime/quantization onnxruntime/transformers \
      onnx/backend/test onnx/reference numpy/f2py \
      PIL/_avif.* PIL/_imagingft.* PIL/_webp.* \
      pillow.libs/libavif-* pillow.libs/libfreetype-* pillow.libs/libharfbuzz-* pillow.libs/libwebp* \
 && find pygments/lexers -name '[a-z]*.py' -delete \
 && find . -type d -name tests -prune -exec rm -r {} + \
 && find . -type f -regex '.*\.\(h\|c\|cc\|cpp\|pyx\|pxd\|proto\|a\)' -delete \
 && strip --strip-unneeded uvloop/*.so httptools/parser/*.so csimdjson.*.so

FROM ${BASE}
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin maestro \
 && install --directory --owner=maestro /var/lib/maestro
COPY --from=build /opt/maestro /opt/maestro
ENV PATH=/opt/maestro/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    MAESTRO_HOST=0.0.0.0 \
    MAESTRO_STATE_DIR=/var/lib/maestro
USER maestro
VOLUME /var/lib/maestro
EXPOSE 8000
# Ready only after calibration, so a first start is given time for it.
HEALTHCHECK --interval=30s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import os, sys; from http.client import HTTPConnection as C; c = C('127.0.0.1', int(os.environ.get('MAESTRO_PORT') or 8000), timeout=2); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
CMD ["maestro", "serve"]
