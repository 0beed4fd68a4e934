"""The jobs of the resource system on a platform: a language model, an encoder of an uploaded table, and a decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ethogram.client import Client
from services.resource.codec import ResourceCodec
from services.resource.decoder.job import load
from services.resource.export import validate
from tests.resource.conftest import tiny_decoder_spec, tiny_reader_spec, tiny_spec, write_tables


@pytest.mark.timeout(300)
def test_from_a_table_to_a_decoder(tmp_path: Path, client: Client) -> None:
    write_tables(tmp_path / "tables")
    tools = client.put(tmp_path / "tables" / "tools.json", name="tools", type="tools")
    profiling = client.put(tmp_path / "tables" / "profiling.csv", name="profiling", type="profiling")

    reader = client.submit("language_model", tiny_reader_spec().model_dump(mode="json", exclude_none=True))
    spec = tiny_spec(
        tools={"artifact": tools.id},
        profiling={"artifact": profiling.id},
        language_model={"job": reader.id, "artifact": "model"},
        held_out=0,
    ).model_dump(mode="json", exclude_none=True)
    encoder = client.submit("resource", spec)
    given = tiny_decoder_spec(export={"job": encoder.id, "artifact": "export"})
    decoder = client.submit("decoder", given.model_dump(mode="json", exclude_none=True))

    for job in (reader, encoder, decoder):
        client.wait(job.id).check()
    client.get(client.output(encoder.id, "encoder").id, tmp_path / "encoder")
    client.get(client.output(encoder.id, "export").id, tmp_path / "export")
    client.get(client.output(decoder.id, "decoder").id, tmp_path / "decoder")
    codec, exported = ResourceCodec.load(tmp_path / "encoder"), validate(tmp_path / "export")
    assert codec.schema.tools == ("detect", "translate") and exported.weights.shape == (16, 16)
    assert codec.table is not None
    torch.testing.assert_close(codec.embed(codec.table.values), exported.weights)
    result = client.job(encoder.id).result
    assert result is not None and result["figures"]["self_retrieval"] == 1
    model, config = load(tmp_path / "decoder")
    assert config["export"] == exported.digest
    tool, configuration = (int(each) for each in model.choose(["translate, large, with 8 cores"]))
    assert config["lookup"][str(configuration)]["tool_name"] == config["tools"][tool]
