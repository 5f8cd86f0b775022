"""A run's sizes from devices, model, batch and earlier runs; what is set is not derived."""

import sys
from types import SimpleNamespace

import msgspec
import pytest

from batch_orchestration.core.batches import settings_hash
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.estimates.costs import Costs
from batch_orchestration.estimates.derivation import request_tokens
from batch_orchestration.estimates.engine import engine_in_force
from batch_orchestration.estimates.estimate import Band, Basis, Estimate
from batch_orchestration.estimates.tables import CachedEngineInfo, EstimateTables
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.inference.window.sizing import Sizing, size_run
from batch_orchestration.settings import Settings
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import NOW, make_batch
from batch_orchestration_tests.support.fake_nvml import GIB, NO_LIBRARY, FakeGpu, FakeNvml
from batch_orchestration_tests.support.tiny_model import make_tiny_model


def make_estimate(requests: int = 100, prompt: float = 400, completion: float = 200) -> Estimate:
    def band(each: float) -> Band:
        return Band(low=each, mid=each, high=each).scaled(requests)

    return Estimate(
        requests=requests,
        prompt_tokens=band(prompt),
        completion_tokens=band(completion),
        basis=Basis.TOKENIZER,
        seconds=None,
    )


def started(kv_cache_tokens: int | None = None) -> EngineInfo:
    return EngineInfo(kind="vllm", version="1", models=("m",), kv_cache_tokens=kv_cache_tokens)


def make_facts(kv_cache_tokens: int) -> CachedEngineInfo:
    return CachedEngineInfo(
        models=("tiny",),
        max_model_len=2048,
        kv_cache_tokens=kv_cache_tokens,
        start_seconds=1.0,
        seen_at=NOW,
    )


class Site:
    """A data folder with one batch, 400 tokens of prompt and 200 of answer a request."""

    def __init__(self, root, *, requests=10):
        self.folder = DataFolder(root / "data")
        self.folder.create()
        self.store = Store(self.folder.duckdb, deadline_seconds=5)
        self.plan = make_batch(self.folder, requests)
        self.store.add_batch(self.plan, at=NOW)
        self.model = make_tiny_model(root / "model")
        self.estimate(make_estimate())

    def estimate(self, estimate: Estimate) -> None:
        """Let this be what the batch is expected to take."""
        path = self.folder.plan_path(self.plan.batch_id).with_name("estimate.json")
        path.write_bytes(msgspec.json.encode(estimate))

    def settings(self, **values) -> Settings:
        values = {
            "engine": "vllm",
            "model": str(self.model),
            "data_dir": self.folder.root,
            **values,
        }
        return Settings(**values, _env_file=None)

    def size(self, **values) -> Sizing:
        return size_run(
            self.settings(**values),
            folder=self.folder,
            store=self.store,
            batch_ids=[self.plan.batch_id],
        )


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.fixture
def install(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*devices, **fields):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*devices, **fields))

    return put


def half_taken() -> FakeGpu:
    return FakeGpu(memory=SimpleNamespace(total=80 * GIB, used=40 * GIB, free=40 * GIB))


def test_on_a_gpu_memory_and_slots_follow_from_what_is_free(site, install):
    install(half_taken())

    sizing = site.size(device="cuda")

    assert sizing.flags["gpu-memory-utilization"] == 0.45
    assert sizing.flags["max-num-seqs"] == 1024  # A tiny model: the cache holds everything.
    assert [each.name for each in sizing.derived] == ["gpu_memory_utilization", "max_num_seqs"]


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({"gpu-memory-utilization": 0.8}, set()),
        ({"gpu_memory_utilization": 0.8}, set()),
        ({"kv-cache-memory-bytes": "4G"}, set()),
        ({"max-num-seqs": 16}, {"gpu-memory-utilization"}),
        ({"max-num-seqs": 16, "gpu-memory-utilization": 0.8}, set()),
    ],
)
def test_what_is_set_is_not_derived(site, install, given, derived):
    install(half_taken())

    assert set(site.size(device="cuda", engine_args=given).flags) == derived


def test_the_engines_own_figure_of_its_cache_is_better_than_the_formula(site, install):
    install(half_taken())
    in_force = engine_in_force(site.settings(device="cuda"))
    facts = make_facts(kv_cache_tokens=50_000)
    EstimateTables(site.store).put_engine_info(in_force, facts)

    assert site.size(device="cuda").flags["max-num-seqs"] == 120  # 1.25 x 0.95 x 50,000 / 500


def test_a_device_that_cannot_be_read_derives_nothing_and_stops_nothing(site, install):
    """The gate judges it, when the engine is about to start."""
    install(init=NO_LIBRARY)

    assert site.size(device="cuda").flags == {}


def test_on_a_cpu_the_cache_stays_as_configured_and_the_slots_follow_from_it(site):
    sizing = site.size(device="cpu", engine_args={"kv-cache-memory-bytes": 2**25})

    # 2 layers, 1 KV head of 32, float32: 512 bytes a token; 1.25 x 0.95 x 65,536 / 500 = 156.
    assert sizing.flags == {"max-num-seqs": 128}


def test_a_remote_or_simulated_engine_is_given_no_flags(site):
    remote = site.size(engine="remote", base_url="http://127.0.0.1:1", model="")

    assert (remote.flags, remote.derived) == ({}, ())
    assert remote.window(started()).value == 256
    assert remote.window(started(100_000)).value == 216


def test_a_window_that_is_set_is_fixed(site):
    sizing = site.size(device="cpu", in_flight=17)

    assert sizing.bounds is None
    assert str(sizing.window(started(10**6))) == "window 17 = as set by BATCH_IN_FLIGHT"
    assert site.size(device="cpu").bounds is not None


def test_what_is_derived_is_no_part_of_the_settings_of_a_plan(site, install):
    """Or else a batch would be refused because a neighbour took memory meanwhile."""
    install(half_taken())
    settings = site.settings(device="cuda")
    before = settings_hash(settings.answer_settings())

    sizing = site.size(device="cuda")

    assert sizing.flags
    assert settings_hash(settings.answer_settings()) == before


def test_what_reading_costs_is_that_of_the_batchs_estimate_at_the_sequences_that_fit(site):
    costs = Costs(request=0.0, prompt_token=0.25, completion_token=0.5, step=216 * 0.5)
    site.estimate(msgspec.structs.replace(make_estimate(), costs=costs, at_a_time=1000))
    in_force = engine_in_force(site.settings(device="cpu"))
    facts = CachedEngineInfo(
        models=("tiny",),
        max_model_len=None,
        kv_cache_tokens=113_684,
        start_seconds=1.0,
        seen_at=NOW,
    )
    EstimateTables(site.store).put_engine_info(in_force, facts)

    # 0.95 x 113,684 / 500 = 216 at a time: 0.25 / (0.5 + 0.5).
    assert site.size(device="cpu").bounds.reading_cost == pytest.approx(0.25, rel=1e-3)


def test_tokens_of_several_batches_are_their_mean_by_requests():
    tokens = request_tokens([make_estimate(100, 400, 200), make_estimate(300, 800, 0), None])

    assert tokens is not None
    assert (tokens.prompt, tokens.completion) == (700, 50)
    assert request_tokens([None]) is None
