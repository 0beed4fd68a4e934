"""An encoder of configurations through a real channel, compared with the encoder itself."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import transformers

from ethogram import channel
from ethogram.embedding import AsyncEmbedding, Configurations, Embedding
from ethogram.errors import EthogramError, IllegalState, InvalidInput, TooLarge, Unavailable
from ethogram.rpc import CHANNEL_OPTIONS, error_of
from ethogram.specs.base import ArtifactRef
from ethogram.v1 import embedding_pb2 as pb
from ethogram.v1.embedding_pb2_grpc import EmbeddingServiceStub
from ethogram.v1.inference_pb2 import ModelRef
from services.artifacts.store import ArtifactStore
from services.crossmodal.codec import Codec
from services.inference.resource import servicer
from services.inference.resource.served import GROUP, Readers, ServedResource
from services.language.models import load_language_model
from services.resource import predict
from services.resource.codec import ResourceCodec
from services.resource.describe import Describer
from services.resource.recommend import Recommender
from tests.inference.conftest import Publish, Running, Serve
from tests.tiny_encoder import ROWS, random_encoder, save_characters


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_characters(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="session")
def encoder(language_folder: Path) -> ResourceCodec:
    return random_encoder(language_folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this machine."""
    monkeypatch.setenv("ETHOGRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def embedding_server(serve: Serve, publish: Publish, encoder: ResourceCodec) -> Running:
    publish(encoder)
    return serve()


@pytest.fixture
def embedding(embedding_server: Running) -> Iterator[Embedding]:
    with Embedding(embedding_server.address, timeout=30) as client:
        yield client


def many(count: int) -> list[dict[str, Any]]:
    """Configurations that differ."""
    return [ROWS[number % 3] | {"latency": number % 1000, "cores": 1 + number % 8} for number in range(count)]


def test_embed_is_the_encoder(embedding: Embedding, encoder: ResourceCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encoder.embed(*encoder.vectors(ROWS)).numpy()
    found = embedding.embed("tiny", ROWS)
    np.testing.assert_allclose(found.embeddings, expected, rtol=1e-5, atol=1e-6)
    assert (found.model, found.version, found.outside) == ("tiny", "1", [[], [], []])
    assert found.embeddings.dtype == np.float32 and found.embeddings.shape == (3, 32)

    single = embedding.embed("tiny", ROWS[1], version="1")
    np.testing.assert_allclose(single.embeddings, expected[1], rtol=1e-5, atol=1e-6)
    assert single.outside == []

    columns = {name: np.array([row[name] for row in ROWS[:2]]) for name in ROWS[0]}
    np.testing.assert_allclose(embedding.embed("tiny", columns).embeddings, expected[:2], rtol=1e-5, atol=1e-6)
    # A value that is left out, None and unknown are the same, in a row alone and beside others.
    for name in ("latency", "cores", "size"):
        rest = {other: value for other, value in ROWS[2].items() if other != name}
        wanted = embedding.embed("tiny", ROWS[2] | {name: "unknown"}).embeddings
        np.testing.assert_allclose(encoder.embed(*encoder.vectors([rest]))[0].numpy(), wanted, rtol=1e-5, atol=1e-6)
        for row in (rest, rest | {name: None}):
            np.testing.assert_array_equal(embedding.embed("tiny", row).embeddings, wanted)
            np.testing.assert_allclose(
                embedding.embed("tiny", [ROWS[0], row]).embeddings[1], wanted, rtol=1e-5, atol=1e-6
            )

    monkeypatch.setattr(channel, "PART_ROWS", 7)
    rows = many(40)
    whole = embedding.embed("tiny", rows).embeddings
    np.testing.assert_allclose(whole, encoder.embed(*encoder.vectors(rows)).numpy(), rtol=1e-5, atol=1e-6)


def test_what_is_outside_the_range_is_answered_and_marked(embedding: Embedding) -> None:
    rows = [ROWS[0], ROWS[0] | {"latency": 5000, "cores": 0}, ROWS[2], ROWS[1] | {"memory": 17}]
    assert embedding.embed("tiny", rows).outside == [[], ["cores", "latency"], [], ["memory"]]
    assert embedding.embed("tiny", rows[3]).outside == ["memory"]
    assert embedding.describe("tiny", rows).outside == [[], ["cores", "latency"], [], ["memory"]]


def test_fields(embedding: Embedding) -> None:
    found = embedding.fields("tiny")
    assert [field.name for field in found.fields] == ["tool", "size", "cores", "memory", "latency"]
    assert found.fields[0].labels == ["read", "write"]
    assert found.fields[1].column == "input_size"
    assert found.fields[2][2:] == ("cores", [], 1.0, 8.0, 0, 1.0, False)
    assert (found.templates, found.size, found.model, found.version) == (["short", "other"], 32, "tiny", "1")


def test_describe_is_the_language_model(embedding: Embedding, encoder: ResourceCodec, language_folder: Path) -> None:
    describer = Describer(load_language_model(str(language_folder)), encoder.schema)
    embeddings = encoder.embed(*encoder.vectors(ROWS))
    for number, template in enumerate(encoder.schema.templates):
        expected = describer.write(encoder.soft(embeddings), template)
        # The first one is the default.
        name = template.name if number else None
        found = embedding.describe("tiny", ROWS, template=name)
        assert found.texts == expected
        assert found.configurations == [None] * 3
        assert embedding.describe_embeddings("tiny", embeddings.numpy(), template=name).texts == expected
        assert embedding.describe_embeddings("tiny", embeddings[1].numpy(), template=name).texts == expected[1]
        assert embedding.describe("tiny", ROWS[2], template=name).texts == expected[2]


def test_a_batch_says_what_each_row_says_alone(embedding_server: Running) -> None:
    rows = many(GROUP + 5)
    with Embedding(embedding_server.address) as client, ThreadPoolExecutor(8) as pool:
        alone = [client.describe("tiny", row).texts for row in rows]
        assert len(set(alone)) > len(rows) // 2
        assert client.describe("tiny", rows).texts == alone
        # Together with rows of others, in any order.
        assert list(pool.map(lambda row: client.describe("tiny", row).texts, reversed(rows))) == alone[::-1]
        embeddings = client.embed("tiny", rows).embeddings
        assert client.describe_embeddings("tiny", embeddings).texts == alone


def test_descriptions_are_read_back(encoder: ResourceCodec, embedding_server: Running, embedding: Embedding) -> None:
    values, _ = encoder.vectors(ROWS[:2])

    class Writer:
        """Describes its second row well."""

        device = torch.device("cpu")

        def write(self, soft: torch.Tensor, template: Any) -> list[str]:
            return ["nothing", template.write(values[1].tolist())] + [""] * (len(soft) - 2)

    embedding.describe("tiny", ROWS)
    (loaded,) = embedding_server.server._repository._loaded.values()
    assert isinstance(loaded.model, ServedResource)
    loaded.model._describer = Writer()  # type: ignore[assignment]
    found = embedding.describe("tiny", ROWS[:2], template="other")
    assert found.texts == ["nothing", "40.0 of write with 8 and 16; large"]
    assert found.configurations == [None, ROWS[1]]


def test_a_wrong_request_loads_no_language_model(embedding_server: Running, embedding: Embedding) -> None:
    with pytest.raises(InvalidInput):
        embedding.describe("tiny", {"tool": "fly"})
    with pytest.raises(InvalidInput):
        embedding.describe("tiny", ROWS, template="long")
    with pytest.raises(InvalidInput):
        embedding.describe_embeddings("tiny", np.zeros((2, 31), np.float32))
    (loaded,) = embedding_server.server._repository._loaded.values()
    assert isinstance(loaded.model, ServedResource) and loaded.model._describer is None
    assert embedding.describe("tiny", {"tool": "read"}).texts and loaded.model._describer is not None


def test_embedding_loads_no_language_model(
    serve: Serve, publish: Publish, encoder: ResourceCodec, tmp_path: Path
) -> None:
    """Without its language model an encoder embeds and recommends, and says why it cannot describe."""
    spec = encoder.spec.model_copy(update={"llm_model": str(tmp_path / "gone")})
    about = encoder.about | {"language_model": str(tmp_path / "gone")}
    publish(ResourceCodec(spec, encoder.schema, encoder.model, about, encoder.table))
    publish(ResourceCodec(spec, encoder.schema, encoder.model, about), "without-table")
    with Embedding(serve().address) as client:
        assert client.embed("tiny", ROWS).embeddings.shape == (3, 32)
        assert client.recommend("tiny", {"tool": "read"}, 500).fits
        with pytest.raises(IllegalState, match=r"cannot describe: language_model: .*gone, .* is no longer there"):
            client.describe("tiny", ROWS)
        with pytest.raises(IllegalState, match="no table of measurements"):
            client.recommend("without-table", {"tool": "read"}, 500)


def test_another_language_model_is_refused(
    serve: Serve, publish: Publish, encoder: ResourceCodec, language_folder: Path, tmp_path: Path
) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(language_folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    shutil.copytree(language_folder, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    about = encoder.about | {"language_model": str(tmp_path / "other")}
    publish(ResourceCodec(encoder.spec, encoder.schema, encoder.model, about, encoder.table))
    with Embedding(serve().address) as client:
        with pytest.raises(IllegalState, match="is not the language model that the encoder was trained with") as caught:
            client.describe("tiny", ROWS)
        assert caught.value.violations[0].field == "model.name"


def test_a_language_model_of_the_store_is_found(
    serve: Serve, publish: Publish, encoder: ResourceCodec, language_folder: Path, tmp_path: Path
) -> None:
    """A job's language model was an artifact, in a folder of the worker that is gone."""
    store = ArtifactStore(str(tmp_path / "state" / "store"))
    parent, _ = store.put(language_folder, name="model", type="language-model")
    spec = encoder.spec.model_copy(update={"language_model": ArtifactRef(artifact=parent), "llm_model": "default"})
    about = encoder.about | {"language_model": str(tmp_path / "gone")}
    publish(ResourceCodec(spec, encoder.schema, encoder.model, about, encoder.table), parents=[parent])
    publish(encoder, "direct")
    running = serve()
    with Embedding(running.address) as client:
        assert client.describe("tiny", ROWS).texts == client.describe("direct", ROWS).texts
    # Two encoders share it.
    describers = [loaded.model._describer for loaded in running.server._repository._loaded.values()]
    assert describers[0].language is describers[1].language


def test_the_same_weights_with_another_tokenizer_are_another_language_model(
    serve: Serve, publish: Publish, encoder: ResourceCodec, language_folder: Path
) -> None:
    """Also where the weights are in memory already."""
    digest = load_language_model(str(language_folder)).tokenizer_digest
    for name, tokenizer in (("same", digest), ("other", "0" * 64)):
        about = encoder.about | {"tokenizer_digest": tokenizer}
        publish(ResourceCodec(encoder.spec, encoder.schema, encoder.model, about, encoder.table), name)
    with Embedding(serve().address) as client:
        assert len(client.describe("same", ROWS).texts) == 3
        with pytest.raises(IllegalState, match="does not have the tokenizer that the encoder was trained with"):
            client.describe("other", ROWS)


def test_a_model_that_cannot_recommend_is_no_fault_of_the_request(
    serve: Serve, publish: Publish, encoder: ResourceCodec
) -> None:
    assert encoder.table is not None
    few = encoder.table.at(torch.arange(9))
    publish(ResourceCodec(encoder.spec, encoder.schema, encoder.model, encoder.about, few), "few")
    dimensions = [dimension.model_copy(update={"measured": False}) for dimension in encoder.schema.spec.dimensions]
    schema = replace(encoder.schema, spec=encoder.schema.spec.model_copy(update={"dimensions": dimensions}))
    table = replace(encoder.table, schema=schema)
    publish(ResourceCodec(encoder.spec, schema, encoder.model, encoder.about, table), "unmeasured")
    with Embedding(serve().address) as client:
        for name, says in (("few", "cannot recommend: table: has 9 measured"), ("unmeasured", "no measured number")):
            with pytest.raises(IllegalState, match=says) as caught:
                client.recommend(name, {"tool": "read"}, 500)
            assert caught.value.violations[0].field == "model.name"
        with pytest.raises(InvalidInput, match="dimension: cores is not a measured number"):
            client.recommend("unmeasured", {"tool": "read"}, 500, dimension="cores")


def test_measurements_that_a_recommendation_left_out_are_counted(
    embedding: Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "MOST_ROWS", 20)
    found = embedding.recommend("tiny", {"tool": "read"}, 500)
    assert (found.measurements, found.measurements_left_out) == (20, 16)


def test_a_default_language_model_is_found_in_this_machines_cache(
    serve: Serve, publish: Publish, encoder: ResourceCodec, language_folder: Path, cache: Path
) -> None:
    spec = encoder.spec.model_copy(update={"llm_model": "default"})
    about = encoder.about | {"language_model": "/elsewhere/language-models/abc/model"}
    publish(ResourceCodec(spec, encoder.schema, encoder.model, about, encoder.table))
    with Embedding(serve().address) as client:
        with pytest.raises(IllegalState, match=r"the default language model .* is not on this machine"):
            client.describe("tiny", ROWS)
        shutil.copytree(language_folder, cache / "language-models" / "abc" / "model")
        assert len(client.describe("tiny", ROWS).texts) == 3


def test_what_takes_long_is_prepared_once_and_holds_nothing_up(
    serve: Serve, publish: Publish, encoder: ResourceCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, let_go = [], threading.Event()

    def slow(self: Readers, artifact: str, codec: ResourceCodec) -> Any:
        loads.append(artifact)
        assert let_go.wait(30)
        return get(self, artifact, codec)

    get = Readers.get
    monkeypatch.setattr(Readers, "get", slow)
    artifact = publish(encoder)
    address = serve().address
    with Embedding(address) as client, ThreadPoolExecutor(40) as pool:
        hasty = Embedding(address, timeout=0.3)
        with pytest.raises(Unavailable):
            hasty.describe("tiny", ROWS)
        hasty.close()
        waiting = [pool.submit(client.describe, "tiny", ROWS) for _ in range(39)]
        assert client.embed("tiny", ROWS).embeddings.shape == (3, 32)
        assert client.recommend("tiny", {"tool": "read"}, 500).fits
        # Also one that nobody asked for yet.
        publish(encoder, "later")
        assert client.embed("later", ROWS).model == "later"
        assert loads == [artifact]
        let_go.set()
        assert len({tuple(call.result().texts) for call in waiting}) == 1
    assert loads == [artifact]


def test_recommend_is_the_recommender(embedding: Embedding, encoder: ResourceCodec) -> None:
    assert encoder.table is not None
    recommender = Recommender(encoder, encoder.table)
    cases: list[tuple[dict[str, Any], float]] = [
        ({"tool": "read"}, 90.0),
        ({"tool": "write", "size": "large", "memory": "unknown", "latency": None}, 150.0),
        ({"tool": "write", "size": "large", "cores": 2}, 10.0),
    ]
    for given, bound in cases:
        expected = recommender.recommend(given, bound, 0.8)
        found = embedding.recommend("tiny", given, bound, confidence=0.8)
        assert found.configurations == expected.configuration
        for name in ("price", "predicted", "upper"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4)
        assert found.fits == expected.fits and found.outside == expected.outside == []
        assert found.dimension == "latency"
        assert (found.measurements, found.measurements_left_out) == (36, 0)
    assert not found.fits and found.upper > 10
    rows: list[dict[str, Any]] = [{"tool": "read", "size": "small"}, {"tool": "write", "size": "large"}]
    batch = embedding.recommend("tiny", rows, [90.0, 150.0])
    assert [row["size"] for row in batch.configurations] == ["small", "large"]
    for number, (row, bound) in enumerate(zip(rows, (90.0, 150.0), strict=True)):
        single = embedding.recommend("tiny", row, bound)
        assert single.configurations == batch.configurations[number]
        assert single.price == batch.price[number] and single.upper == batch.upper[number]


def test_a_prediction_outside_the_range_is_marked(serve: Serve, publish: Publish, encoder: ResourceCodec) -> None:
    table = encoder.table
    assert table is not None
    far = replace(table, values=table.values * torch.tensor([1, 1, 1, 1, 100], dtype=torch.float64))
    publish(ResourceCodec(encoder.spec, encoder.schema, encoder.model, encoder.about, far))
    with Embedding(serve().address) as client:
        assert client.recommend("tiny", {"tool": "read"}, 9e6).outside == ["latency"]
        # 1,000 is the end of the range.
        rows = [{"tool": tool, "size": size, "cores": 8} for tool in ("read", "write") for size in ("small", "large")]
        found = client.recommend("tiny", rows, 9e6)
    assert found.outside == [["latency"] if number > 1000 else [] for number in found.predicted]


def test_streams_answer_in_order(embedding_server: Running, embedding: Embedding) -> None:
    requests = [
        pb.RecommendRequest(
            model=ModelRef(name="tiny"),
            configurations=pb.ResourceRows(columns={"tool": pb.ResourceColumn(labels=["read"])}),
            bounds=[bound],
        )
        for bound in (1.0, 60.0, 200.0)
    ]
    with grpc.insecure_channel(embedding_server.address, options=CHANNEL_OPTIONS) as wire:
        stub = EmbeddingServiceStub(wire)
        alone = [stub.Recommend(request, timeout=30) for request in requests]
        assert list(stub.RecommendStream(iter(requests), timeout=30)) == alone
        assert [list(answer.fits) for answer in alone] == [[False], [True], [True]]
        with pytest.raises(grpc.RpcError) as caught:
            bad = pb.RecommendRequest(model=ModelRef(name="tiny"), configurations=requests[0].configurations)
            list(stub.RecommendStream(iter([requests[0], bad]), timeout=30))
    assert error_of(caught.value).violations[0].field == "requests.1.bounds"


async def test_the_async_client(embedding_server: Running, encoder: ResourceCodec) -> None:
    async with AsyncEmbedding(embedding_server.address, timeout=30) as client:
        embedded, described, recommended, fields = await asyncio.gather(
            client.embed("tiny", ROWS),
            client.describe("tiny", ROWS[0], template="other"),
            client.recommend("tiny", {"tool": "read"}, 500),
            client.fields("tiny"),
        )
        texts = (await client.describe_embeddings("tiny", embedded.embeddings, template="other")).texts
        with pytest.raises(InvalidInput, match="no such field"):
            await client.embed("tiny", {"speed": 3})
    assert described.texts == texts[0] and recommended.fits and fields.size == encoder.size


GOOD = ROWS[0]
WRONG: list[tuple[Configurations, str, str]] = [
    (GOOD | {"tool": "fly"}, "tool.0", "must be one of read, write, not 'fly'"),
    ([GOOD, GOOD | {"size": "huge"}], "size.1", "must be one of small, large"),
    (GOOD | {"size": 3}, "size.0", "must be one of small, large, not 3.0"),
    (GOOD | {"cores": "many"}, "cores.0", "must be a number from 0"),
    (GOOD | {"cores": -1}, "cores.0", "must be a number from 0"),
    (GOOD | {"cores": float("nan")}, "cores.0", "must be a number from 0"),
    (GOOD | {"cores": float("inf")}, "cores.0", "must be a number from 0"),
    (GOOD | {"cores": 1e7}, "cores.0", "must be a number from 0 to 9999999"),
    (GOOD | {"cores": 10**400}, "cores.0", "must be a number from 0 to 9999999"),
    (GOOD | {"cores": -(10**5000)}, "cores.0", "must be a number from 0 to 9999999"),
    (GOOD | {"cores": True}, "cores.0", "must be a number or text"),
    (GOOD | {"speed": 1}, "speed", "there is no such field; there are tool, size"),
    (GOOD | {"core": 1}, "core", "did you mean cores?"),
    (GOOD | {"input_size": "small"}, "input_size", "did you mean size?"),
    ([GOOD, GOOD | {"cores": 4.4}], "cores.1", "4.4 has more decimals than its descriptions, which have 0"),
    (GOOD | {"tool": None}, "tool.0", "the tool must be known"),
    ({"size": "small"}, "tool", "is missing: the tool must be known"),
    ([GOOD, {"size": "small"}], "tool.1", "the tool must be known"),
    (GOOD | {"size": ["small", "large"], "cores": [1, 2]}, "tool", "has one value, and others have 2"),
    ([GOOD, GOOD | {"size": 4}], "size.1", "must be text, as in other rows"),
    ([], "configurations", "an empty batch"),
]


@pytest.mark.parametrize(("configurations", "field", "says"), WRONG)
def test_wrong_configurations(embedding: Embedding, configurations: Configurations, field: str, says: str) -> None:
    for call in (embedding.embed, embedding.describe):
        with pytest.raises(InvalidInput) as caught:
            call("tiny", configurations)
        assert caught.value.violations[0].field == (field if field == "configurations" else f"configurations.{field}")
        assert says in caught.value.message


def test_the_row_of_a_large_set_is_named(embedding: Embedding, monkeypatch: pytest.MonkeyPatch) -> None:
    """It travels in parts, each with rows of its own numbers."""
    monkeypatch.setattr(channel, "PART_ROWS", 7)
    rows = many(40)
    rows[30] |= {"size": "huge"}
    rows[33] |= {"cores": -1}
    for call in (embedding.embed, embedding.describe):
        with pytest.raises(InvalidInput) as caught:
            call("tiny", rows)
        assert [violation.field for violation in caught.value.violations] == [
            "configurations.size.30",
            "configurations.cores.33",
        ]
        assert caught.value.message.startswith("configurations.size.30: must be one of small, large, not 'huge' (and 1")
    with pytest.raises(InvalidInput, match=r"^configurations\.speed: there is no such field"):
        embedding.embed("tiny", [row | {"speed": 1} for row in many(40)])
    with pytest.raises(InvalidInput, match=r"^bounds\.17: must be a number above 0"):
        embedding.recommend("tiny", [{"tool": "read"}] * 40, [5.0] * 17 + [0.0] * 23)


def test_numbers_of_fewer_bits_are_as_they_are_written(embedding: Embedding) -> None:
    """In 64 bits 120.1 of 32 bits has more decimals than that."""
    wanted = embedding.embed("tiny", ROWS[0] | {"latency": 120.1}).embeddings
    single = np.float32(120.1)
    np.testing.assert_array_equal(embedding.embed("tiny", ROWS[0] | {"latency": single}).embeddings, wanted)
    array = np.array([single])
    for column in (array, torch.from_numpy(array), pytest.importorskip("pandas").Series(array)):
        columns = {name: [value] for name, value in ROWS[0].items()} | {"latency": column}
        np.testing.assert_array_equal(embedding.embed("tiny", columns).embeddings[0], wanted)
    # What NumPy does not take is as its own numbers are.
    columns["latency"] = torch.tensor([40.0], requires_grad=True)
    whole = embedding.embed("tiny", ROWS[0] | {"latency": 40}).embeddings
    np.testing.assert_array_equal(embedding.embed("tiny", columns).embeddings[0], whole)


def test_a_row_that_alone_is_too_large_is_named_as_it_was_given(
    embedding: Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "TEXT_BYTES", 10**10)
    for rows in (ROWS, ROWS[0]):
        with pytest.raises(TooLarge, match=r"^configurations: the answer would take") as caught:
            embedding.describe("tiny", rows)
        assert [violation.field for violation in caught.value.violations] == ["configurations"]


def test_rounding_errors_are_taken_away(embedding: Embedding, encoder: ResourceCodec) -> None:
    noisy = 3 * 0.1 * 10
    assert noisy != 3
    wanted = encoder.embed(*encoder.vectors([ROWS[0] | {"cores": 3}])).numpy()
    np.testing.assert_array_equal(encoder.embed(*encoder.vectors([ROWS[0] | {"cores": noisy}])).numpy(), wanted)
    np.testing.assert_allclose(embedding.embed("tiny", [ROWS[0] | {"cores": noisy}]).embeddings, wanted, rtol=1e-5)
    with pytest.raises(
        InvalidInput, match=r"cores\.0: 3\.00000001 has more decimals than its descriptions, which have"
    ):
        embedding.embed("tiny", ROWS[0] | {"cores": 3.00000001})


def refused(call: Any, request: Any) -> tuple[grpc.StatusCode, EthogramError]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return caught.value.code(), error_of(caught.value)


def test_requests_that_no_client_of_ours_sends(embedding_server: Running) -> None:
    model, both = ModelRef(name="tiny"), pb.ResourceColumn(numbers=[1], labels=["read"])
    short = {"tool": pb.ResourceColumn(labels=["read"]), "cores": pb.ResourceColumn(numbers=[1, 2])}
    hidden = {"tool": pb.ResourceColumn(labels=["read"], unknown=[False, True])}
    with grpc.insecure_channel(embedding_server.address, options=CHANNEL_OPTIONS) as wire:
        stub = EmbeddingServiceStub(wire)
        for call, request, field in (
            (stub.EmbedResources, pb.EmbedResourcesRequest(), "configurations"),
            (stub.EmbedResources, pb.EmbedResourcesRequest(configurations=pb.ResourceRows()), "model.name"),
            (
                stub.EmbedResources,
                pb.EmbedResourcesRequest(model=model, configurations=pb.ResourceRows(columns={"tool": both})),
                "configurations.tool",
            ),
            (
                stub.EmbedResources,
                pb.EmbedResourcesRequest(model=model, configurations=pb.ResourceRows(columns=short)),
                "configurations.tool",
            ),
            (
                stub.EmbedResources,
                pb.EmbedResourcesRequest(model=model, configurations=pb.ResourceRows(columns=hidden)),
                "configurations.tool",
            ),
            (stub.Describe, pb.DescribeRequest(model=model), "input"),
            (stub.Recommend, pb.RecommendRequest(model=model), "configurations"),
            (stub.ListFields, pb.ListFieldsRequest(), "model.name"),
        ):
            code, error = refused(call, request)
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert error.violations[0].field == field


def test_wrong_embeddings_templates_and_requirements(embedding: Embedding) -> None:
    nan = np.full((2, 32), np.nan, np.float32)
    for embeddings, says in ((np.zeros((2, 31), np.float32), r"floats \[batch, 32\]"), (nan, "NaN")):
        with pytest.raises(InvalidInput, match=says) as caught:
            embedding.describe_embeddings("tiny", embeddings)
        assert caught.value.violations[0].field == "embeddings"
    with pytest.raises(InvalidInput, match=r"template: there is no 'long'; there are short, other"):
        embedding.describe("tiny", ROWS, template="long")

    tool = {"tool": "read"}
    for given, options, field, says in (
        (tool, {"bound": 0}, "bounds.0", "above 0"),
        (tool, {"bound": float("nan")}, "bounds.0", "above 0"),
        ([tool, tool], {"bound": [5.0, -1.0]}, "bounds.1", "above 0"),
        ([tool, tool], {"bound": [5.0]}, "bound", "2 rows"),
        (tool, {"bound": "5"}, "bound", "must be a number, or a list with one for each row"),
        (tool, {"bound": None}, "bound", "must be a number"),
        (tool, {"bound": 10**400}, "bound", "must be a number"),
        ([tool, tool], {"bound": [5.0, "x"]}, "bound", "must be a number"),
        ([tool, tool], {"bound": [[5.0], [5.0, 6.0]]}, "bound", "must be a number"),
        (tool, {"bound": 5, "confidence": 1}, "confidence", "between 0 and 1"),
        (tool, {"bound": 5, "confidence": 0.999}, "confidence", "takes at least 999 measurements, and there are 36"),
        (tool, {"bound": 5, "dimension": "speed"}, "dimension", "there is no 'speed'"),
        (tool, {"bound": 5, "dimension": "cores"}, "dimension", "is not a measured number"),
        ({"size": "small"}, {"bound": 5}, "configurations.tool", "is missing"),
        (tool | {"latency": 3}, {"bound": 5}, "configurations.latency.0", "is measured"),
        (
            [tool, tool | {"cores": 3}],
            {"bound": 5},
            "configurations.cores.1",
            "no configuration has 3; there are 2, 4, 8",
        ),
    ):
        with pytest.raises(InvalidInput, match=says) as caught:
            embedding.recommend("tiny", given, **options)  # type: ignore[arg-type]
        assert caught.value.violations[0].field == field


def test_each_service_takes_its_own_models(
    serve: Serve, publish: Publish, encoder: ResourceCodec, codec: Codec
) -> None:
    publish(encoder, "vectors")
    publish(codec, "networks")
    with Embedding(serve().address) as client:
        with pytest.raises(InvalidInput, match=r"model\.name: networks is a codec, which this call does not take"):
            client.embed("networks", ROWS)
        assert client.embed("vectors", ROWS).model == "vectors"


def test_a_bundle_keeps_its_table(encoder: ResourceCodec, tmp_path: Path) -> None:
    encoder.save(tmp_path / "whole")
    table = ResourceCodec.load(tmp_path / "whole").table
    assert table is not None and encoder.table is not None and torch.equal(table.values, encoder.table.values)
    cut = replace(encoder.table, values=encoder.table.values[:, :3])
    ResourceCodec(encoder.spec, encoder.schema, encoder.model, encoder.about, cut).save(tmp_path / "cut")
    with pytest.raises(InvalidInput, match=r"table\.safetensors.*has not the 5 fields"):
        ResourceCodec.load(tmp_path / "cut")
