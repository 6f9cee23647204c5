"""Artifacts in an S3 store that only the server has the keys of; the store is moto's, over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from team.server import serve

from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.registry.fetch import fetch
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import promote
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.server_check import Level, check_store
from mechdiff_mlflow.tracking.store.store import open_store

BUCKET = "maps"
KEYS = {"AWS_ACCESS_KEY_ID": "server-only", "AWS_SECRET_ACCESS_KEY": "server-only-secret"}


class OnS3(NamedTuple):
    """A server and the bucket behind it."""

    uri: str
    bucket: Any

    def objects(self) -> dict[str, bytes]:
        return {item.key: item.get()["Body"].read() for item in self.bucket.objects.all()}


@pytest.fixture(scope="module")
def on_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnS3]:
    folder = tmp_path_factory.mktemp("s3")
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        bucket = boto3.resource("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket=BUCKET)
        environment = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        words = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--serve-artifacts"]
        words += ["--artifacts-destination", f"s3://{BUCKET}/team"]
        with serve(folder, words, environment) as uri:
            yield OnS3(uri, bucket)
    finally:
        store.stop()


def test_maps_go_to_s3_and_come_back_by_way_of_the_server(on_s3: OnS3, tmp_path: Path) -> None:
    findings = {finding.check: finding for finding in check_store(on_s3.uri)}
    assert findings["artifact proxy"].level is Level.OK
    assert on_s3.objects() == {}, "the probe was deleted"

    store = open_store(on_s3.uri)
    weight = Weight.low_rank(torch.eye(6)[:, :2].double(), torch.eye(6)[:2].double(), 1.0)
    a_map = AffineMap(torch.zeros(6).double(), torch.ones(6).double(), weight, 1.0, {"k": 2})
    params = {"pair": "demo", "layer": 3, "hook": "attn_out", "k": 2, "solver": "reduced_rank"}
    metrics = {"drop_pct": 34.2, "ci/drop_pct_low": 30.1}
    record = RunRecord(kind="fit", name="fit", params=params, metrics=metrics, map=a_map)
    version = promote(store, Tracker(store, "demo").log(record), policy=PromotionPolicy(force=True))

    found = fetch("demo-L3-attn_out@champion", tmp_path / "map.pt", store=store)
    fetched = (tmp_path / "map.pt").read_bytes()
    assert hashlib.sha256(fetched).hexdigest() == found.sha256 == version.sha256
    assert [body for key, body in on_s3.objects().items() if key.endswith("/map.pt")] == [fetched]
