# A server of packed models, or any other verb that needs no torch. Build and run it as docs/deploy.md says.
# PYTHON_IMAGE: an image of Debian or Ubuntu with Python 3.11 or newer, its headers and venv; both stages use it.
ARG PYTHON_IMAGE=python:3.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY . /source
# pip stays in the build stage. Bytecode is compiled here: the user of the image may not write it, and without it every
# start would compile all modules again. The packages' own tests are 16 MB, symbols for debuggers 22 MB; numpy's libraries
# were edited after they were linked, which strip may not survive.
RUN export PIP_CONSTRAINT=/source/constraints.txt PIP_BUILD_CONSTRAINT=/source/constraints.txt \
    && python3 -m venv /build && python3 -m venv --without-pip /opt/pruneofa \
    && /build/bin/pip --python /opt/pruneofa install --no-cache-dir '/source[serve]' \
    && find /opt/pruneofa -type d -name tests -prune -exec rm -r {} + \
    && find /opt/pruneofa -name '*.so' ! -path '*/numpy*' -exec strip --strip-unneeded {} +

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/pruneofa /opt/pruneofa
# HF_HOME: where models named by a hub id are kept. Only /tmp is written to: these, and metrics with --workers.
ENV PATH=/opt/pruneofa/bin:$PATH HF_HOME=/tmp/huggingface PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 3000
HEALTHCHECK --start-period=60s --interval=10s --timeout=3s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/health', timeout=2)"]
# As many threads as the CPU quota of the container pays for, unless --threads is given.
ENTRYPOINT ["pruneofa"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
