import pytest

from server.errors import InvalidError, ServiceError, UnavailableError
from server.schemas import parse_parameters, parse_profile_request


def test_nothing_given_means_no_target() -> None:
    parameters = parse_parameters({}, {})

    assert parameters.max_latency_ms is None
    assert parameters.on_miss == "degrade"


def test_the_smallest_target_binds() -> None:
    query, body = [("max_latency_ms", "20")], {"max_latency_ms": 7.5}

    assert parse_parameters(query, body, ["30", None]).max_latency_ms == 7.5
    assert parse_parameters(query, {}, ["30", None]).max_latency_ms == 20
    assert parse_parameters({}, body, ["3", 8.0]).max_latency_ms == 3
    assert parse_parameters(query, body, form=[("max_latency_ms", "5")]).max_latency_ms == 5


@pytest.mark.parametrize("targets", [("5", "50"), ("50", "5"), ("50", "5", "5.0")])
def test_the_smallest_target_binds_of_those_given_in_one_place(targets: tuple[str, ...]) -> None:
    pairs = [("point", "1"), *(("max_latency_ms", ms) for ms in targets)]

    for parameters in (parse_parameters(pairs, {}), parse_parameters([], {}, form=pairs)):
        assert (parameters.max_latency_ms, parameters.point) == (5, 1)


def test_a_parameter_is_not_given_twice_with_different_values() -> None:
    same = parse_parameters([("point", "1"), ("point", "1")], {})
    assert same.point == 1

    with pytest.raises(InvalidError, match="point: given as '1' and as '2'"):
        parse_parameters([("point", "1"), ("point", "2")], {})
    with pytest.raises(InvalidError, match=r"max_latency_ms: .*not '-1'"):
        parse_parameters([("max_latency_ms", "-1"), ("max_latency_ms", "5")], {})


def test_the_body_wins_over_the_query_elsewhere() -> None:
    query, form = [("point", "1"), ("top_k", "2"), ("priority", "1")], [("top_k", "4")]

    parameters = parse_parameters(query, {"point": 3}, form=form)

    assert (parameters.point, parameters.top_k, parameters.priority) == (3, 4, 1)


def test_null_in_the_body_is_as_if_the_parameter_were_not_there() -> None:
    query = [("min_accuracy", "0.9"), ("max_latency_ms", "5")]
    body = dict.fromkeys(("min_accuracy", "max_latency_ms", "on_miss", "priority", "top_k"))

    assert parse_parameters(query, body) == parse_parameters(query, {})
    with pytest.raises(InvalidError, match="unknown parameter 'deadline'"):
        parse_parameters(query, {"deadline": None})


def test_the_largest_target_is_taken_whenever_it_comes() -> None:
    largest = parse_parameters([("max_latency_ms", "3600000")], {})

    for i in range(1000):
        arrived_s = 130_000 + 0.0137 * i  # the sum is past 2**17, and rounded
        assert largest.request("a", arrived_s, 1).deadline_s == arrived_s + 3600


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"max_latency_ms": "-1"}, r"max_latency_ms: .*greater than 0, not '-1'"),
        ({"max_latency_ms": "0"}, r"max_latency_ms: .*greater than 0"),
        ({"max_latency_ms": "nan"}, r"max_latency_ms: "),
        ({"max_latency_ms": "inf"}, r"max_latency_ms: "),
        ({"max_latency_ms": "1e9"}, r"max_latency_ms: .*less than or equal to 3600000"),
        ({"max_latency_ms": "soon"}, r"max_latency_ms: .*not 'soon'"),
        ({"max_latency_ms": "9" * 5000}, r"max_latency_ms: "),
        ({"min_accuracy": "98.5"}, r"min_accuracy: .*less than or equal to 1"),
        ({"on_miss": "panic"}, r"on_miss: .*'degrade' or 'reject'"),
        ({"point": "-1"}, r"point: "),
        ({"max_latency": "5"}, r"unknown parameter 'max_latency'; known: max_latency_ms, "),
    ],
)
def test_a_wrong_parameter_is_named(query: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        parse_parameters(query.items(), {})


def test_what_to_calibrate_is_in_the_query_and_in_the_body_which_wins() -> None:
    query = [("kind", "quick"), ("search", "true")]

    asked = parse_profile_request(query, {})
    assert (asked.kind, asked.search) == ("quick", True)
    both = parse_profile_request(query, {"search": False})
    assert (both.kind, both.search) == ("quick", False)
    assert parse_profile_request([], {}).kind == "full"
    assert parse_profile_request(query, {"kind": None, "search": None}) == asked
    with pytest.raises(InvalidError, match="budget"):
        parse_profile_request([], {"budget": None})


def test_a_wrong_header_is_named() -> None:
    with pytest.raises(InvalidError, match=r"max_latency_ms: .*'soon'"):
        parse_parameters({}, {}, ["soon"])


def test_a_problem_repeats_its_detail_as_error() -> None:
    error: ServiceError = UnavailableError("the queue is full", retry_after_s=1.2)

    problem = error.problem()

    assert problem["status"] == 503
    assert problem["error"] == problem["detail"] == "the queue is full"
    assert problem["retry_after_ms"] == 1200
    assert error.headers() == {"Retry-After": "2"}
