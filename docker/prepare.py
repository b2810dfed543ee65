"""What the servers of compose.yaml need once before workers start: buckets, then pools and deployments. Done again, it changes nothing."""

import os
import subprocess
import sys
from urllib.parse import urlsplit

import boto3
from botocore.exceptions import ClientError


def make_bucket(uri: str) -> None:
    """Create the bucket of an s3:// address where there is none; other addresses need nothing."""
    place = urlsplit(uri)
    if place.scheme != "s3":
        return
    store = boto3.client("s3")
    try:
        store.head_bucket(Bucket=place.netloc)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise SystemExit(f"setup: bucket {place.netloc}: {error}") from error
        store.create_bucket(Bucket=place.netloc)
        print(f"setup: bucket {place.netloc} made")


def main() -> int:
    for name in ("BMFM_WORKSPACE", "MLFLOW_ARTIFACTS_DESTINATION"):
        make_bucket(os.environ.get(name, ""))
    gpus = os.environ.get("BMFM_GPUS", "1")
    return subprocess.run(["bmfm", "deploy", "--gpus", gpus], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
