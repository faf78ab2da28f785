"""The datacentre in virtual time: modelled devices, and that equal seeds give equal bytes."""

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from baton.engine.batch import Batch, BatchItem, SampleRequest
from baton.errors import ConfigError
from baton.types.request import SamplingParams
from sim.costs.compute import Prefill
from sim.fleet.device import TICK_S, ModelledDevice
from sim.fleet.hardware import Hardware
from sim.fleet.prompts import Prompts
from sim.fleet.records import OK
from sim.fleet.result import Result
from sim.fleet.run import simulate
from sim.fleet.spec import Admission, Cache, FleetSpec
from sim.workload.trace import Request

ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(temperature=0.0)


class Counted:
    """Seconds: 1 for a step, 0.01 for each prompt token, 0.1 for each decode."""

    def seconds(self, prefill, decode):
        return 1 + 0.01 * sum(part.new for part in prefill) + 0.1 * len(decode)


def prompt_item(units, start=0):
    return BatchItem(1, (0,) * units, start, (), SampleRequest(GREEDY, 0, ()))


def decode_item(sequence):
    return BatchItem(sequence, (), 40, (), SampleRequest(GREEDY, 3, ()), follows=True)


def test_a_step_of_prompts_alone_takes_what_its_tokens_take():
    device = ModelledDevice(Counted(), grain=16, budget=64, group_ends=[80])
    assert device.of(Batch(1, (prompt_item(10),))) == pytest.approx(1 + 0.01 * 160)
    assert device.prefill_s == pytest.approx(2.6)
    assert device.decode_s == 0


def test_a_step_that_decodes_stands_for_as_many_real_steps_as_a_unit_has_tokens():
    device = ModelledDevice(Counted(), grain=16, budget=64, group_ends=[80])
    assert device.of(Batch(1, (decode_item(1), decode_item(2)))) == pytest.approx(16 * 1.2)
    assert device.decode_s == pytest.approx(16 * 1.2)


def test_prompts_are_spread_over_as_few_of_these_steps_as_their_budget_allows():
    device = ModelledDevice(Counted(), grain=16, budget=64, group_ends=[80])
    batch = Batch(1, (decode_item(1), prompt_item(10)))  # 160 tokens: 3 steps of 54
    assert device.of(batch) == pytest.approx(16 * 1.1 + 3 * 0.54)
    told = device.end(batch.items).tokens
    assert [token.token_id * TICK_S for token in told] == pytest.approx([1.64, 1.64])


def test_prompts_of_a_trace_share_what_their_hashes_share():
    prompts = Prompts(16)
    one, other = prompts.prompt(1100, (7, 8, 70_000)), prompts.prompt(1100, (7, 9, 70_000))
    assert len(one) == 69
    assert one[:32] == other[:32]
    assert one[32:64] != other[32:64]
    assert (prompts.answer_units(1), prompts.answer_units(17), prompts.answer_units(18)) == (
        1,
        2,
        3,
    )


@pytest.mark.parametrize("cluster", ["0P+1D", "2P", "P+D", "2P+3M", "8", ""])
def test_a_cluster_that_cannot_be_is_refused(cluster):
    with pytest.raises(ConfigError):
        FleetSpec(cluster)


def test_a_chunk_holds_a_unit():
    with pytest.raises(ConfigError, match="--grain"):
        FleetSpec("1P+1D", chunk_tokens=8)


def test_a_spec_goes_through_json():
    spec = FleetSpec("2P+3D", cache=Cache.LOCAL, admission=Admission.LOAD, seed=4)
    assert FleetSpec.from_json(orjson.loads(orjson.dumps(spec.as_json()))) == spec
    assert (spec.prefill, spec.decode, spec.coupled) == (2, 3, False)
    with pytest.raises(ConfigError):
        FleetSpec.from_json(spec.as_json() | {"gpus": 1})


def requests(count=24):
    """Pairs that ask the same twice, half a second apart."""
    return [
        Request(
            0.5 * n, 3000 + 512 * (n // 2), 40, tuple(range(100 * (n // 2), 100 * (n // 2) + 20))
        )
        for n in range(count)
    ]


def run(cluster, asked=None, **options) -> Result:
    return simulate(FleetSpec(cluster, **options), iter(asked or requests()), {})


@pytest.mark.parametrize("cluster", ["2P+2D", "3M"])
def test_every_request_is_answered_and_the_books_are_right(cluster):
    result = run(cluster)
    records = result.records
    assert result.totals["codes"] == {OK: 24}
    assert set(records.column("output_tokens")) == {40}
    assert (records.column("ttft_s") > 0).all()
    assert (records.column("tbt_max_s") >= records.column("tbt_mean_s") - 1e-6).all()
    assert set(records.texts("decode")) <= {"d0", "d1", "m0", "m1", "m2"}
    assert result.totals["prefill_busy_s"] > 0 < result.totals["decode_busy_s"]


def test_a_record_says_what_the_prompt_waited_for():
    records = run("2P+2D").records
    parts = sum(records.column(f"{name}_s") for name in ("queue", "fetch", "prefill"))
    assert parts == pytest.approx(records.column("ttft_s"), abs=1e-6)
    assert (records.column("queue_s") >= 0).all()
    assert (records.column("prefill_s") > 0).all()


@pytest.mark.parametrize("grain", [16, 64])
def test_prompts_are_computed_in_the_chunks_that_were_asked_for(grain):
    """Small ones cost more; so that they are as small as that is seen."""
    asked = requests(4)
    whole, chunked = (
        run("1P+1D", asked, cache=Cache.NONE, grain=grain, chunk_tokens=tokens)
        for tokens in (1 << 17, 128)
    )
    assert chunked.totals["prefill_busy_s"] > 1.5 * whole.totals["prefill_busy_s"]


def test_what_was_computed_is_found_again_unless_there_is_no_cache():
    assert run("2P+2D").totals["cached_share"] > 0.3
    assert run("2P+2D", cache=Cache.NONE).totals["cached_share"] == 0


def test_kv_crosses_the_network_from_prefill_to_decode():
    result = run("1P+1D", cache=Cache.NONE)
    moved = dict.fromkeys(result.links.texts("link"), 0)
    for name in moved:
        moved[name] = int(result.links.column("bytes")[result.links.where("link", name)].sum())
    blocks = sum(-(-r.input_tokens // 512) for r in requests())
    assert moved == dict.fromkeys(("p0 NIC out", "d0 NIC in"), blocks * 512 * 327680)


def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": r.at_s * 1e3, "input_length": r.input_tokens, "output_length": 40}
        | {"hash_ids": r.blocks[: -(-r.input_tokens // 512)]}
        for r in requests(12)
    ]
    trace.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    files = []
    for hash_seed in ("1", "2"):
        files.append(tmp_path / f"{hash_seed}.json")
        command = [sys.executable, "-m", "sim.fleet", "--trace", trace, "--cluster", "2P+2D"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(
            [*command, "--json", files[-1]], cwd=ROOT, env=environment, check=True, timeout=120
        )
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("cache", [Cache.LOCAL, Cache.GLOBAL])
def test_what_a_small_pool_forgets_comes_from_the_stores(cache):
    twice = [
        Request(3.0 * n, 10_000, 20, tuple(range(20 * (n % 8), 20 * (n % 8) + 20)))
        for n in range(16)
    ]
    without = run("2M", twice, kv_blocks=40, cache=cache)
    result = run("2M", twice, kv_blocks=40, store_blocks=2000, cache=cache)
    assert result.totals["codes"] == {OK: 16}
    assert result.totals["cached_share"] > without.totals["cached_share"]
    if cache is Cache.GLOBAL:  # where the choice is free, the worker beside the store is chosen
        result = run("2M", twice, kv_blocks=40, store_blocks=2000, cache=cache, policy="random")
    crossed = [link for link in result.links.texts("link") if "NIC" in link]
    assert bool(crossed) is (cache is Cache.GLOBAL)


def test_what_a_small_cpu_tier_forgets_comes_from_nvme_at_its_rate():
    """Twelve prompts of 19 blocks and a half, each asked twice: 228 blocks, of which GPU and CPU
    memory keep 144."""
    twice = [
        Request(5.0 * n, 10_000, 20, tuple(range(20 * (n % 12), 20 * (n % 12) + 20)))
        for n in range(24)
    ]
    sizes = {"kv_blocks": 24, "store_blocks": 120, "cache": Cache.LOCAL}
    without = run("1M", twice, **sizes)
    result = run("1M", twice, nvme_blocks=400, **sizes)
    assert without.totals["cached_share"] == 0 < 0.4 < result.totals["cached_share"]
    table, moved = result.links, {}
    for way in ("read", "write"):
        moved[way] = table.column("bytes")[table.where("link", f"m0 NVMe {way}")].sum()
    block = 512 * 327680
    assert moved["write"] >= 100 * block
    assert moved["read"] >= 8 * 15 * block
    assert result.totals["fetch_s"]["max"] > 19 * block / (4 * 6.8e9) > 0.1


def test_an_nvme_tier_needs_a_cpu_tier_and_known_drives():
    with pytest.raises(ConfigError, match="--store-blocks"):
        FleetSpec("1P+1D", nvme_blocks=8)
    node = f"calibrated:{ROOT / 'docs' / 'results' / 'engine-qwen3-0.6b.json'}"
    sizes = {"kv_blocks": 64, "store_blocks": 64, "nvme_blocks": 64}
    with pytest.raises(ConfigError, match="--nvme-blocks"):
        Hardware(FleetSpec("1P+1D", model="qwen3-0.6b", node=node, network_gbps=10, **sizes))


def test_a_calibrated_machine_has_no_links_of_its_own():
    node = f"calibrated:{ROOT / 'docs' / 'results' / 'engine-qwen3-0.6b.json'}"
    with pytest.raises(ConfigError, match="network-gbps"):
        Hardware(FleetSpec("1P+1D", model="qwen3-0.6b", node=node))
    spec = FleetSpec("1P+1D", model="qwen3-0.6b", node=node, kv_blocks=64, network_gbps=10)
    assert Hardware(spec).cost.seconds([Prefill(512)], ()) > 0.1
