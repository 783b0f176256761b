"""tools.bench_serve: the right requests at the right times, honest figures, against a real server."""

import asyncio
import itertools
import json
from xml.etree import ElementTree

import pytest

from tools import bench_serve
from tools.bench_serve import Point, arrivals, spread, summary, workload
from tools.serve_client import Client, Timing
from tools.serve_plot import plot


def timing(due, tokens, ended, **more):
    return Timing(due, sent_s=due, ended_s=ended, status=200, prompt_tokens=10, tokens=tokens, **more)


# ---- what is sent ----


def test_arrivals_are_seeded_and_as_frequent_as_asked():
    times = list(arrivals(50.0, 4000, seed=3))
    assert times == list(arrivals(50.0, 4000, seed=3)) != list(arrivals(50.0, 4000, seed=4))
    assert times[0] == 0 and times == sorted(times)
    # The mean of 4,000 exponential gaps has a standard deviation of 1/63 of it.
    assert times[-1] / 3999 == pytest.approx(1 / 50, rel=0.06)
    gaps = sorted(after - before for before, after in itertools.pairwise(times))
    assert gaps[2000] == pytest.approx(0.693 / 50, rel=0.1)  # an exponential's median


def test_random_prompts_are_the_same_everywhere_and_differ_from_run_to_run():
    requests = workload("random", 3, 20, 7, seed=1)
    assert [len(prompt) for prompt, _ in requests] == [20, 20, 20]
    assert {out for _, out in requests} == {7}
    assert requests == workload("random", 3, 20, 7, seed=1) != workload("random", 3, 20, 7, seed=2)


def test_closed_loop_keeps_as_many_requests_going_as_it_has_clients():
    going, most = 0, 0

    class Slow:
        async def generate(self, body, due_s=None):
            nonlocal going, most
            going += 1
            most = max(most, going)
            await asyncio.sleep(0)
            going -= 1
            return timing(0.0, [(1.0, 1)], 1.0)

    out = asyncio.run(bench_serve.run(Slow(), workload("random", 10, 4, 1, 0), Point(concurrency=3), 0))
    assert (len(out), most) == (10, 3)


# ---- figures ----


def test_times_count_from_when_a_request_was_due():
    late = Timing(due_s=1.0, sent_s=3.0, ended_s=9.0, status=200, tokens=[(4.0, 1), (6.0, 2), (8.0, 5)])
    assert (late.ttft_s, late.e2e_s, late.tpot_s, late.itl_s) == (3.0, 8.0, 1.0, [2.0, 2.0])


def test_percentiles_are_values_that_so_many_do_not_exceed():
    assert spread(list(range(100, 0, -1))) == {"mean": 50.5, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert spread([7.0]) == {"mean": 7.0, "p50": 7.0, "p90": 7.0, "p99": 7.0, "max": 7.0}
    assert spread([]) is None


def test_summary_counts_failures_apart():
    failed = Timing(0.0, ended_s=5.0, status=503, error="full")
    figures = summary([timing(0.0, [(1.0, 1), (2.0, 3)], 2.0), timing(2.0, [(4.0, 5)], 4.0), failed])
    assert (figures["requests"], figures["failed"]) == (3, 1)
    assert figures["first_failure"] == "status 503: full"
    assert figures["seconds"] == 5.0
    assert figures["output_tokens_per_s"] == 8 / 5
    assert figures["total_tokens_per_s"] == 28 / 5
    assert figures["ttft_ms"]["mean"] == 1500
    assert figures["tpot_ms"]["mean"] == 500  # one token alone has none


def test_plot_has_a_curve_of_each_kind_through_every_point():
    runs = [summary([timing(0.0, [(1.0, 1), (2.0, 3)], 2.0)])]
    svg = ElementTree.fromstring(plot([{"load": "a", "runs": runs}, {"load": "b", "runs": runs}], "x < y"))
    curves = svg.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(curve.attrib["points"].split()) for curve in curves] == [2, 2, 2, 2]
    assert plot([{"load": "none", "runs": [{"failed": 1}]}], "nothing came").endswith("</svg>")


# ---- against a server ----


@pytest.mark.parametrize("load", [["--concurrency", "2,3"], ["--request-rate", "200"]])
def test_whole_run_streams_every_request_and_writes_figures_and_plot(server, tmp_path, capsys, load):
    server.engine.script = lambda request: [65 + n for n in range(request.sampling.max_new_tokens)]
    target, curve = tmp_path / "figures.json", tmp_path / "curve.svg"
    argv = ["--url", server.url, *load, "--num-requests", "6", "--repeats", "2", "--warm-up", "2"]
    argv += ["--max-token-id", "300"]
    argv += ["--input-len", "5", "--output-len", "4", "--json", str(target), "--plot", str(curve)]
    assert bench_serve.main(argv) == 0
    points = json.loads(target.read_text())["points"]
    assert [len(point["runs"]) for point in points] == [2] * len(load[1].split(","))
    for figures in (run for point in points for run in point["runs"]):
        assert (figures["requests"], figures["failed"]) == (6, 0)
        assert figures["output_tokens_per_s"] * figures["seconds"] == pytest.approx(24)
        assert figures["ttft_ms"]["max"] <= figures["e2e_ms"]["max"]
    assert len(server.engine.requests) == 2 + 12 * len(points)
    prompts = {tuple(request.input_ids) for request in server.engine.requests}
    assert len(prompts) == len(server.engine.requests), "a prompt that came before would be cached"
    assert "TTFT p50/p90/p99" in capsys.readouterr().out
    ElementTree.parse(curve)


def test_connection_is_used_again_and_every_token_has_its_moment(server):
    server.engine.script = lambda request: [65, 66, 67]
    clock = itertools.count()

    async def two():
        client = Client(server.url, clock=lambda: float(next(clock)))
        out = [await client.generate(bench_serve.body_of(([5, 6], 3))) for _ in range(2)]
        idle = len(client._idle)
        client.close()
        return out, idle

    timings, idle = asyncio.run(two())
    assert idle == 1
    for each in timings:
        assert each.is_good and [count for _, count in each.tokens] == [1, 2, 3]
        assert each.due_s < each.sent_s < each.ttft_s + each.due_s < each.ended_s
        assert each.prompt_tokens == 2


def test_refused_and_broken_requests_are_failures_with_their_reason(server):
    async def ask(url, prompt):
        client = Client(url)
        out = await client.generate(bench_serve.body_of((prompt, 3)))
        client.close()
        return out

    refused = asyncio.run(ask(server.url, [10**9]))
    assert refused.status == 400 and not refused.is_good and "input_ids" in refused.error
    nobody = asyncio.run(ask("http://127.0.0.1:1", [5]))
    assert nobody.status == 0 and "cannot connect" in nobody.error


def test_sampling_params_are_those_of_every_request(server):
    given = '{"temperature": 0.5, "regex": "[a-z]*"}'
    argv = ["--url", server.url, "--num-requests", "2", "--repeats", "1", "--warm-up", "1"]
    argv += ["--max-token-id", "300", "--sampling-params", given]
    assert bench_serve.main(argv) == 0
    for request in server.engine.requests:
        assert request.sampling.temperature == 0.5 and "[a-z]*" in request.sampling.grammar


def test_every_run_starts_with_an_empty_prefix_cache(server, capsys):
    emptied = []  # at each request, how often the cache was emptied before
    server.engine.script = lambda request: [emptied.append(server.engine.calls.count("flush_cache")), 65][1:]
    argv = ["--url", server.url, "--num-requests", "3", "--repeats", "2", "--warm-up", "2"]
    assert bench_serve.main([*argv, "--max-token-id", "300", "--input-len", "5"]) == 0
    assert emptied == [0, 0, 1, 1, 1, 2, 2, 2]
    bench_serve.flush_cache(f"{server.url}/nowhere", None)
    assert "not emptied between runs: HTTP Error 404" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--request-rate", "0"], "request_rate=0 must be positive"),
        (["--request-rate", "inf"], "request_rate=inf must be positive"),
        (["--concurrency", "4,0"], "concurrency=4,0 must be positive"),
        (["--concurrency", "x"], "invalid literal"),
        (["--repeats", "0"], "repeats=0 is too small"),
        (["--sampling-params", "[1]"], "argument --sampling-params: invalid"),
    ],
)
def test_bad_arguments_are_refused_by_name(argv, message, capsys):
    with pytest.raises(SystemExit):
        bench_serve.main(argv)
    assert message in capsys.readouterr().err
