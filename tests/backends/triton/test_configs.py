"""Work tables, configurations and tuning of the Triton backend: plain Python, no triton, no device."""

import json
import subprocess
import sys

import pytest

from mpq_kernels import FormatError, UnsupportedError
from mpq_kernels.backends.triton import configs, tune, why_unavailable, work
from mpq_kernels.backends.triton.configs import TOKEN_CLASSES, Config, Device
from mpq_kernels.format.layout import Segment, WeightLayout
from tests.made.weights import mixed_weight, random_weight


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.stored.cache_clear()
    yield
    configs.stored.cache_clear()


def items_of(plan):
    return [plan.items[i : i + work.ITEM_INTS] for i in range(0, len(plan.items), work.ITEM_INTS)]


@pytest.mark.parametrize("supertiles", [1, 2, 4])
@pytest.mark.parametrize("programs", [1, 7, 100])
def test_items_cover_every_tile_once(supertiles, programs):
    layout = mixed_weight().layout
    covered = {}
    for item in items_of(work.plan(layout, supertiles, programs)):
        for tile in range(item[work.TILES_LEFT]):
            row = item[work.ROW0] + 64 * tile
            assert row < item[work.ROW_END]
            for column in range(item[work.COLUMN0], item[work.COLUMN_END], 64):
                covered[row, column] = covered.get((row, column), 0) + 1
    expected = {
        (row, column): 1 for s in layout.segments for row in range(s.n0, s.n1, 64) for column in range(s.k0, s.k1, 64)
    }
    assert covered == expected


def test_parts_are_balanced_by_bytes_and_numbered_in_order():
    plan = work.plan(random_weight(256, 4096, 2, 64).layout, 4, 16)
    items = items_of(plan)
    assert [item[work.PART] for item in items] == list(range(16)) and {item[work.PARTS] for item in items} == {16}
    assert {item[work.COLUMNS] for item in items} == {256} and plan.parts == 16 and plan.num_blocks == 1


H200_UNITS = 132
DEEP = WeightLayout(
    57344, 8192, tuple(Segment(0, 57344, 1024 * i, 1024 * i + 1024, (2, 8)[i % 2], 64, "int") for i in range(8))
)


def launch_of(layout, config, tokens):
    """(plan, token blocks, bytes of the sums of parts) as launch.py has them."""
    blocks = -(-tokens // config.block_m)
    programs, most = work.share(H200_UNITS * config.programs_per_unit, blocks, tokens, layout.out_features)
    plan = work.plan(layout, config.num_warps, programs, most=most)
    once = min(tokens, work.tokens_at_once(plan.parts, layout.out_features, config.block_m))
    return plan, blocks, 4 * layout.out_features * once * plan.parts if plan.parts > 1 else 0


@pytest.mark.parametrize("tokens", [1, 16, 17, 32, 33, 64, 128, 256])
@pytest.mark.parametrize(("rows", "cols"), [(8192, 8192), (4096, 14336), (28672, 4096), (256, 8192), (1024, 57344)])
def test_programs_are_shared_out_among_blocks_of_tokens(rows, cols, tokens):
    """As many programs as the device holds, whatever the number of tokens; sums of parts for no more rows and tokens
    than these programs have: a half more for rounding."""
    layout, config = (
        WeightLayout.uniform(rows, cols, 4, 128, "int"),
        configs.TABLE["cuda:90"][configs.token_class(tokens)],
    )
    plan, blocks, partial = launch_of(layout, config, tokens)
    wanted = H200_UNITS * config.programs_per_unit
    unsplit = -(-rows // (64 * config.num_warps)) * blocks
    assert plan.num_items * blocks <= max(1.5 * wanted, unsplit)
    assert partial <= 1.5 * wanted * 64 * config.num_warps * config.block_m * 4 < 14e6


def test_weights_with_enough_rows_need_no_second_launch():
    layout = WeightLayout.uniform(8192, 8192, 4, 128, "int")
    for tokens, parts in ((1, 12), (64, 4), (128, 2), (256, 1)):
        plan, _, partial = launch_of(layout, configs.TABLE["cuda:90"][configs.token_class(tokens)], tokens)
        assert plan.parts == parts and (plan.num_blocks == 0) == (partial == 0) == (parts == 1)


@pytest.mark.parametrize("programs", configs.ALLOWED["programs_per_unit"])
@pytest.mark.parametrize("block_m", configs.ALLOWED["block_m"])
@pytest.mark.parametrize("layout", [DEEP, WeightLayout.uniform(57344, 8192, 8, 64), mixed_weight().layout])
def test_sums_of_parts_are_bounded_whatever_was_tuned(layout, block_m, programs):
    for tokens in (1, 100, 256):
        plan, _, partial = launch_of(layout, Config(block_m, 8, programs_per_unit=programs), tokens)
        one_block = 4 * layout.out_features * min(tokens, block_m) * 8
        assert partial <= max(work.MOST_PARTIAL_BYTES, one_block)


def test_no_more_parts_than_asked_for_but_for_segments():
    band = DEEP.bands()[0]
    for most in (1, 9, 20):
        plan = work.plan(DEEP, 4, 10**6, most=most)
        widths = [item[work.COLUMNS] for item in items_of(plan)[: plan.parts]]
        assert plan.parts == max(most, len(band)) and sum(widths) == 8192
    # The wide segments are cut first.
    assert widths[0] == 1024 and widths[1] < 1024


def test_choices_are_by_device_then_architecture_then_vendor():
    mine = tuple(Config(16, num_stages=1 + i) for i in range(len(TOKEN_CLASSES)))
    h200 = Device("NVIDIA H200", "cuda:90", 132)
    assert configs.choose(h200, 17, {"NVIDIA H200": mine}) == mine[2]
    assert configs.choose(h200, 1, {}) == configs.TABLE["cuda:90"][0]
    assert configs.choose(Device("?", "cuda:121", 1), 1000, {}) == configs.TABLE["cuda"][-1]
    assert configs.choose(Device("?", "hip:gfx950", 1), 1, {}) == configs.TABLE["hip"][0]
    assert all(row.source for rows in configs.TABLE.values() for row in rows)


def test_stages_keep_as_many_bytes_on_their_way_at_every_width():
    for bits in range(1, 9):
        for step in (64, 32, 16):
            stages = configs.stages(4, bits, step)
            on_their_way = (stages - 2) * 4 * 64 * step * bits // 8  # of a program of four supertiles
            assert stages == configs.MOST_STAGES or 16384 <= on_their_way <= 28672
    assert [configs.stages(4, bits, 64) for bits in (8, 4, 3, 2)] == [3, 4, 5, 6]
    assert configs.stages(2, 1, 16) == 2 and configs.stages(1, 8, 64) == 1


def test_columns_by_compiler():
    assert configs.natural_columns("cuda:90", (3, 6)) and not configs.natural_columns("cuda:80", (3, 7))
    assert configs.natural_columns("cuda:120", (3, 8)) and not configs.natural_columns("hip:gfx942", (3, 9))
    assert configs.widest_step("cuda:80", (3, 6), 32) == 32 and configs.widest_step("cuda:80", (3, 6), 16) == 64
    assert configs.widest_step("cuda:80", (3, 9), 32) == configs.widest_step("cuda:90", (3, 6), 32) == 64


def test_tuning_takes_the_fastest_and_stores_it():
    def measure(config, tokens):
        if config.num_stages == 4:
            raise RuntimeError("out of shared memory")
        return abs(config.programs_per_unit - 6) + abs(config.num_warps - 2) + config.num_stages + config.block_m / 100

    said = []
    rows = tune.tune(measure, said.append, source="a test")
    assert rows == tuple(Config(16, 2, 3, 6, "a test") for _ in TOKEN_CLASSES)
    assert any("does not run: out of shared memory" in line for line in said)
    tune.store("one", rows)
    tune.store("two", rows)
    assert set(configs.read(configs.cache_file())) == {"one", "two"}
    assert configs.choose(Device("one", "cuda:90", 1), 1) == rows[0]


def test_nothing_runs():
    def measure(config, tokens):
        raise RuntimeError("no")

    with pytest.raises(UnsupportedError, match="no configuration runs for 4 tokens"):
        tune.tune(measure, lambda line: None)


@pytest.mark.parametrize("text", ["", "[]", '{"devices": {"x": [1]}}', '{"devices": {"x": []}}', '{"other": 1}'])
def test_a_damaged_file_is_refused(text):
    configs.cache_file().parent.mkdir(parents=True)
    configs.cache_file().write_text(text)
    with pytest.raises(FormatError, match="holds no tuned configurations.*mpq tune"):
        configs.stored()


def test_a_configuration_out_of_range_is_refused():
    rows = [dict(block_m=16, num_warps=4, num_stages=3, programs_per_unit=3, source="")] * len(TOKEN_CLASSES)
    rows[0] = rows[0] | {"num_warps": 5}
    configs.cache_file().parent.mkdir(parents=True)
    configs.cache_file().write_text(json.dumps({"devices": {"x": rows}}))
    with pytest.raises(FormatError, match="num_warps=5"):
        configs.stored()


@pytest.mark.skipif(why_unavailable() is None, reason="the Triton backend works here")
def test_the_command_refuses_without_a_gpu():
    command = [sys.executable, "-m", "mpq_kernels", "tune"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "nothing to tune, the Triton backend does not work here: " in result.stderr
    assert not configs.cache_file().exists()
