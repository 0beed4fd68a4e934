"""What Prometheus is told of an inference server, over HTTP."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from ethogram.errors import Conflict, EthogramError
from ethogram.inference import Inference
from ethogram.platform.stack import free_port
from services.crossmodal.codec import Codec
from services.inference.settings import InferenceSettings
from tests.gateway.test_metrics import value
from tests.inference.conftest import Material, Publish, Serve
from tests.inference.test_server import Gate, arrays, gate

__all__ = ["gate"]


def test_calls_queue_and_device_are_told(
    serve: Serve,
    publish: Publish,
    codec: Codec,
    material: Material,
    gate: Gate,
    *,
    tmp_path: Path,
) -> None:
    publish(codec)
    port = free_port()
    server = serve(metrics_port=port)

    def told() -> str:
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
        return answer.text

    assert value(told(), "ethogram_inference_models") == 0
    with Inference(server.address, timeout=20) as client:
        asking = threading.Thread(target=client.encode, args=("tiny", arrays(material, 3)))
        asking.start()
        assert gate.entered.wait(10)
        assert value(told(), "ethogram_inference_pending_rows") == 3
        gate.opened.set()
        asking.join()
        with pytest.raises(EthogramError):
            client.encode("nobody", arrays(material, 1))
    text = told()
    assert value(text, "ethogram_inference_pending_rows") == 0
    assert value(text, "ethogram_inference_models") == 1
    encode = "CodecService/Encode"
    assert value(text, "ethogram_inference_calls_total", method=encode, code="OK") == 1
    assert value(text, "ethogram_inference_calls_total", method=encode, code="NOT_FOUND") == 1
    assert value(text, "ethogram_inference_call_seconds_count", method=encode) == 2
    assert value(text, "ethogram_inference_batch_rows_sum") == 3
    assert value(text, "ethogram_inference_compute_seconds_count") == 1
    assert value(text, "ethogram_inference_queue_seconds_count") == 1
    other = server.call(server._made(InferenceSettings(device="cpu", metrics_port=port, state=tmp_path))).result(30)
    with pytest.raises(Conflict, match="ETHOGRAM_METRICS_PORT"):
        server.call(other.start()).result(30)
    server.stop()
    with pytest.raises(httpx.TransportError):
        told()
