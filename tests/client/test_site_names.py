"""Names of sites."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.site_names import check_site_name, site_names_from


def test_site_names_are_safe_as_file_names():
    values = ["ward 7/b", "../etc", "plain", "Zürich"]
    assert list(site_names_from(values, "x").values()) == ["ward-7-b", "etc", "plain", "Z-rich"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a b", "a/b"], "'a b' and 'a/b' would both name the site 'a-b'"),
        (["North", "north"], "'North' and 'north' would both name the site 'north'"),
        (["..."], r"'\.\.\.' cannot name a site"),
        (["x" * 101], "'x+' cannot name a site: 1 to 100"),
    ],
)
def test_values_that_name_no_site_of_their_own_are_refused(values, message):
    with pytest.raises(ValueError, match=f"partition.column: {message}"):
        site_names_from(values, "partition.column")


@given(st.text())
@settings(max_examples=200)
def test_a_site_name_is_one_path_component_and_stays_as_it_is(value):
    try:
        name = site_names_from([value], "x")[value]
    except ValueError:
        return
    assert name not in {"", ".", ".."}
    assert "/" not in name
    assert name.isascii()
    assert site_names_from([name], "x") == {name: name}


@given(st.one_of(st.text(), st.text("aZ9._-", max_size=4), st.integers(99, 101).map("x".__mul__)))
@settings(max_examples=300)
def test_a_given_site_name_is_taken_if_it_would_stay_as_it_is(name):
    try:
        stays = site_names_from([name], "x")[name] == name
    except ValueError:
        stays = False
    if stays:
        check_site_name(name, "--name")
    else:
        with pytest.raises(ValueError, match="--name must be 1 to 100 letters"):
            check_site_name(name, "--name")
