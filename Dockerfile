# docker build -t lightning-kfac . && docker run --rm -v "$PWD/runs:/data/runs" lightning-kfac fit --config quickstart
FROM python:3.11-slim
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY configs configs
COPY lightning_kfac lightning_kfac
# For GPUs leave the index of CPU wheels out.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt .
WORKDIR /data
ENTRYPOINT ["lightning-kfac"]
