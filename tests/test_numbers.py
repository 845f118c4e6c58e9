import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import UserError
from sae.numbers import format_count, format_size, format_time, parse_count, parse_size, parse_width


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", 1000),
        ("1.5M", 1_500_000),
        (" 2 b ", 2_000_000_000),
        (".5k", 500),
        (7, 7),
    ],
)
def test_counts_take_k_m_and_b(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "1.5", "1e6", "nan", "inf", "1,000", "1kk", "0.0001k", "one", "1 000"]
)
def test_what_is_no_count_is_refused_with_the_text_itself(text):
    with pytest.raises(UserError, match="count") as caught:
        parse_count(text)
    assert repr(text) in str(caught.value)


@given(st.integers(min_value=0, max_value=10**400))
def test_every_whole_number_is_read_exactly(value):
    assert parse_count(str(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16k", 16_384),
        ("65k", 65_536),
        ("131k", 131_072),
        ("262k", 262_144),
        ("1M", 2**20),
        ("2k", 2048),
        ("16000", 16_000),
    ],
)
def test_widths_mean_the_power_of_two_that_the_field_means(text, value):
    assert parse_width(text) == value


def test_a_width_far_from_a_power_of_two_is_taken_as_it_stands():
    assert parse_width("12k") == 12_000
    assert parse_width("0k") == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("8G", 2**33), ("8GB", 2**33), ("8gib", 2**33), ("1.5K", 1536), ("512", 512), ("1t", 2**40)],
)
def test_sizes_are_powers_of_1024(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "G", "-8G", "8X", "8 giga", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12.34, "12.3"),
        (999, "999"),
        (999.7, "1k"),
        (1234567, "1.23M"),
        (999_499, "999k"),
        (999_500, "1M"),
        (2e9, "2B"),
    ],
)
def test_counts_are_written_with_three_figures(value, text):
    assert format_count(value) == text


@given(st.integers(min_value=0, max_value=10**14))
def test_a_written_count_reads_back_within_its_three_figures(value):
    assert abs(parse_count(format_count(value)) - value) <= 0.0051 * value


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20 - 1, "1.0 MiB"), (2**33, "8.0 GiB")],
)
def test_sizes_are_written_in_powers_of_1024(value, text):
    assert format_size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_times_are_written_for_people(seconds, text):
    assert format_time(seconds) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_written_and_does_not_raise(value):
    # the time left is infinite while nothing has been done
    assert [write(value) for write in (format_count, format_size, format_time)] == ["?", "?", "?"]
