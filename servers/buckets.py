"""Creates the buckets of the S3 store, if it has none yet: one for MLflow's artifacts, one for DVC."""

import os

import boto3


def main() -> None:
    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in {"mlflow", "dvc"} - present:
        client.create_bucket(Bucket=name)


if __name__ == "__main__":
    main()
