# docker build -t lightning-kfac . && docker run --rm lightning-kfac fit --config quickstart
FROM python:3.11-slim
WORKDIR /app
COPY . .
# For GPUs leave out the index of CPU wheels.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt .
WORKDIR /runs
ENTRYPOINT ["lightning-kfac"]
