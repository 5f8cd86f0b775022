"""vLLM's page of metrics, as vLLM 0.32 writes it, and pages that are none."""

import pytest

from batch_orchestration.engines.metrics import EngineMetrics, parse_metrics

LABELS = 'engine="0",model_name="tiny"'
PAGE = f"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{LABELS}}} 7.0
vllm:num_requests_waiting{{{LABELS}}} 3.0
vllm:num_requests_waiting_by_reason{{{LABELS},reason="capacity"}} 3.0
vllm:kv_cache_usage_perc{{{LABELS}}} 0.625
vllm:prefix_cache_queries_total{{{LABELS}}} 900.0
vllm:prefix_cache_queries_created{{{LABELS}}} 1.7e+09
vllm:prefix_cache_hits_total{{{LABELS}}} 128.0
vllm:num_preemptions_total{{{LABELS}}} 2.0
vllm:prompt_tokens_total{{{LABELS}}} 1.2345678e+07
vllm:prompt_tokens_created{{{LABELS}}} 1.7e+09
vllm:prompt_tokens_by_source_total{{{LABELS},source="local"}} 5.0
vllm:generation_tokens_total{{{LABELS}}} 4096.0
vllm:iteration_tokens_total_bucket{{{LABELS},le="1.0"}} 11.0
vllm:cache_config_info{{block_size="16",cache_dtype="auto",num_gpu_blocks="2048"}} 1.0
python_gc_objects_collected_total{{generation="0"}} 8.0
"""


def test_every_series_that_we_go_by_is_read() -> None:
    assert parse_metrics(PAGE) == EngineMetrics(
        running=7,
        waiting=3,
        kv_usage=0.625,
        kv_cache_tokens=16 * 2048,
        preemptions=2,
        prompt_tokens=12_345_678,
        generation_tokens=4096,
        prefix_queries=900,
        prefix_hits=128,
    )


def test_several_engines_of_one_server_are_added_up_and_their_caches_usage_is_the_mean() -> None:
    second = PAGE.replace('engine="0"', 'engine="1"').replace(" 0.625", " 0.125")

    both = parse_metrics(PAGE + second)

    assert (both.running, both.waiting, both.preemptions) == (14, 6, 4)
    assert both.kv_usage == 0.375
    assert both.kv_cache_tokens == 2 * 16 * 2048


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<html>404: Not Found</html>",
        '{"detail": "Not Found"}',
        "process_cpu_seconds_total 3.0\n",
        "vllm:num_requests_running\nvllm:generation_tokens_total NaN",
        "vllm:kv_cache_usage_perc +Inf\n",
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0',
    ],
)
def test_a_page_without_our_series_tells_nothing(page: str) -> None:
    assert parse_metrics(page) == EngineMetrics()


def test_tokens_are_known_as_soon_as_one_kind_is_counted() -> None:
    assert EngineMetrics().tokens is None
    assert EngineMetrics(generation_tokens=5).tokens == 5
    assert EngineMetrics(generation_tokens=5, prompt_tokens=7).tokens == 12


@pytest.mark.parametrize(
    "value", ["NaN", "+Inf", "-Inf", "-1", "1e308", "9" * 5000, "many", "", "0x10"]
)
def test_a_figure_that_is_no_count_is_not_told(value: str) -> None:
    page = "".join(
        f"vllm:{name}{{{LABELS}}} {value}\n" * 2
        for name in ("num_requests_running", "kv_cache_usage_perc", "generation_tokens_total")
    )

    assert parse_metrics(page) == EngineMetrics()


@pytest.mark.parametrize("blocks", ["-5", "9" * 5000, "x", "", "1e9", "٣" * 5000])
def test_a_cache_of_no_size_is_not_told(blocks: str) -> None:
    page = f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{blocks}"}} 1.0\n'

    assert parse_metrics(page).kv_cache_tokens is None


def test_figures_that_are_large_fit_the_store() -> None:
    caches = f'vllm:cache_config_info{{block_size="{10**14}",num_gpu_blocks="{10**14}"}} 1.0\n'
    counters = f"vllm:generation_tokens_total {2**53}\n"

    figures = parse_metrics(caches * 3 + counters * 1_000 + "vllm:kv_cache_usage_perc 7\n")

    assert figures == EngineMetrics(kv_usage=1.0, kv_cache_tokens=2**53, generation_tokens=2**53)
