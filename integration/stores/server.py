"""An S3 server of our own with one bucket: says where it is, and ends when its input does."""

import os
import sys

import boto3
from moto.server import ThreadedMotoServer

from integration.stores.names import BUCKET

if __name__ == "__main__":
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
    print(url, file=said, flush=True)
    sys.stdin.read()
    server.stop()
