"""Published logs: reading them, Welch's test and pairs, and real A/A splits of drawn records."""

import csv
import math

import numpy as np
import pytest

from xushi.base.errors import BadInput
from xushi.ladder.judge import Logs, judge, read_logs
from xushi.ladder.verdict import RunVariance, look_at_pairs


@pytest.fixture
def write(tmp_path):
    def rows(text: str):
        path = tmp_path / "logs.csv"
        path.write_text(text)
        return path

    return rows


HEAD = "arm,run,metric\n"


def arms(**runs: list[float]) -> str:
    return HEAD + "".join(
        f"{arm},{number},{value}\n" for arm in runs for number, value in enumerate(runs[arm])
    )


def test_a_run_of_several_rows_counts_with_its_last(write):
    read = read_logs(write(HEAD + "a,1,5\nb,1,7\na,1,3\na,2,4\n"))
    assert read.runs == {"a": {"1": 3, "2": 4}, "b": {"1": 7}}
    assert list(read.runs) == ["a", "b"]
    assert read.seeds == {}


def test_columns_are_found_by_name_in_any_order(write):
    path = write("acc,seed,who,n\n0.5,10,a,1\n0.7,11,b,1\n")
    read = read_logs(path, ["who", "n", "acc", "seed"], higher_is_better=True)
    assert read.runs == {"a": {"1": -0.5}, "b": {"1": -0.7}}
    assert read.seeds == {"a": {"10": -0.5}, "b": {"11": -0.7}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEAD + "a,1,x\nb,1,1\n", "line 2: 'x' is not a number"),
        (HEAD + "a,1,1\nb,1,nan\n", "line 3: run 1 of b has nan"),
        (HEAD + "a,1,1\nb,1\n", "line 3 has fewer columns"),
        (HEAD + "a,1,1\na,2,1\n", "has 1 arms"),
        (HEAD, "has 0 arms"),
        ("", "has no column arm"),
        ("arm,run,loss\na,1,1\n", "has no column metric; it has arm, run, loss"),
    ],
)
def test_logs_that_cannot_be_judged(write, text, problem):
    with pytest.raises(BadInput) as caught:
        read_logs(write(text))
    assert problem in caught.value.problem


def test_files_that_are_no_logs(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary", "."):
        with pytest.raises(BadInput, match="cannot be read"):
            read_logs(tmp_path / name)


def test_the_same_seed_twice_is_refused(write):
    text = "arm,run,metric,seed\na,1,1,7\na,2,1,7\nb,1,1,7\n"
    with pytest.raises(BadInput, match="seed 7 of a is used by two runs, 1 and 2"):
        read_logs(write(text), ["arm", "run", "metric", "seed"])


def test_welchs_test_by_hand(write):
    """Means 10 and 7, squared errors 4 / 3 and 1 / 3: t = 3 / sqrt(5 / 3); degrees of freedom
    (5 / 3)^2 / ((4 / 3)^2 / 2 + (1 / 3)^2 / 2) = 50 / 17. P(T > 2.3238) between that of 2 and 3
    degrees, which tables give as .0729 and .0514.
    """
    found = judge(read_logs(write(arms(a=[8, 10, 12], b=[6, 7, 8]))), "a", "b", 0.5)
    assert (found.difference, found.paired) == (3, False)
    assert 0.0514 < found.p_gain < 0.0729
    assert found.high - 3 == pytest.approx(3 - found.low)
    # 1.2910 times the quantile between those of 2 and 3 degrees, 2.920 and 2.353.
    assert 1.2910 * 2.353 < found.high - 3 < 1.2910 * 2.920
    assert found.verdict == "unsettled"


@pytest.mark.parametrize(
    ("a", "b", "smallest", "verdict"),
    [
        ([10, 10.1, 9.9], [5, 5.1, 4.9], 0.5, "better"),
        ([5, 5.1, 4.9], [10, 10.1, 9.9], 0.5, "worse"),
        ([5, 5.1, 4.9], [5.01, 5.1, 4.9], 0.5, "none"),
        ([5, 5.1, 4.9], [5.01, 5.1, 4.9], 0.01, "unsettled"),
        ([5], [1, 1.1], 0.01, "unsettled"),
        ([5, 5, 5], [1, 1], 0.01, "unsettled"),
    ],
)
def test_verdicts_of_independent_arms(write, a, b, smallest, verdict):
    found = judge(read_logs(write(arms(a=a, b=b))), "a", "b", smallest)
    assert found.verdict == verdict
    assert (found.baseline_runs, found.variant_runs) == (len(a), len(b))
    assert bool(found.reason)


def test_runs_with_the_same_seed_are_pairs(write):
    """In the order of the baseline's file; what has no partner is left out."""
    columns = ["arm", "run", "metric", "seed"]
    text = (
        "arm,run,metric,seed\na,1,1,7\na,2,2,8\na,3,4,9\nb,1,3.9,9\nb,2,0.8,7\nb,3,5,6\nb,4,1.8,8\n"
    )
    found = judge(read_logs(write(text), columns), "a", "b", 0.01)
    look = look_at_pairs([1, 2, 4], [0.8, 1.8, 3.9], RunVariance(), 0.05)
    assert found.paired
    assert (found.low, found.high, found.p_gain) == (
        pytest.approx(look.low, rel=1e-9),
        pytest.approx(look.high, rel=1e-9),
        pytest.approx(look.p_gain, rel=1e-9),
    )
    assert (found.baseline_runs, found.variant_runs) == (3, 3)


def test_one_shared_seed_is_no_pairing(write):
    text = "arm,run,metric,seed\na,1,1,7\na,2,2,8\nb,1,3.9,9\nb,2,0.8,7\n"
    assert not judge(read_logs(write(text), ["arm", "run", "metric", "seed"]), "a", "b", 1).paired


def test_an_arm_that_is_not_there(write):
    with pytest.raises(BadInput, match="no arm c"):
        judge(read_logs(write(arms(a=[1], b=[2]))), "a", "c", 1)


def test_random_halves_of_a_record_differ_seldom():
    """Records of ten runs with four digits, as such logs have them; halves of one are a real A/A
    comparison. 900 splits of 300 records: at most .05 on each side, and four binomial deviations
    of as many independent ones.
    """
    random = np.random.default_rng(50)
    said = {"better": 0, "worse": 0, "unsettled": 0, "none": 0}
    for _ in range(300):
        runs = np.round(3.28 + 0.0013 * random.normal(size=10), 4)
        for _ in range(3):
            halves = np.split(random.permutation(runs), 2)
            logs = Logs(
                {arm: dict(enumerate(half)) for arm, half in zip("ab", halves, strict=True)}, {}
            )
            said[judge(logs, "a", "b", 1e-9).verdict] += 1
    for verdict in ("better", "worse"):
        assert 0.02 < said[verdict] / 900 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 900)


def test_a_byte_order_mark_and_quotes_are_read(tmp_path):
    path = tmp_path / "logs.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("arm", "run", "metric"), ("a, b", 1, 2), ("c", 1, 3)])
    assert list(read_logs(path).runs) == ["a, b", "c"]
