"""No part of a URL that may be a credential is shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_sampler.errors import redact

SCHEME = st.sampled_from(["s3", "gs", "https", "ray", "simplecache::s3"])
SECRET = (
    st.text("abcXYZ0189+=:@/%!$&-_~", min_size=1)
    .filter(lambda text: "::" not in text)
    .map(lambda text: f"SECRET{text}SECRET")
)
USER = st.text("abcXYZ0189%-_~", min_size=1)
HOST = st.from_regex(r"[a-z]{1,8}(\.[a-z]{2,3})?(:[0-9]{2,5})?", fullmatch=True)
PATH = st.from_regex(r"(/[A-Za-z0-9_.-]{1,8}){0,3}/?", fullmatch=True)


@given(scheme=SCHEME, user=USER, secret=SECRET, host=HOST, path=PATH)
def test_a_password_is_redacted_whatever_it_holds(scheme: str, user: str, secret: str, host: str, path: str) -> None:
    assert redact(f"{scheme}://{user}:{secret}@{host}{path}") == f"{scheme}://{host}{path}"


@given(token=st.text("abcXYZ0189+=@%!$&-_~", min_size=1), host=HOST, path=PATH)
def test_a_user_name_is_redacted_as_it_may_be_a_token(token: str, host: str, path: str) -> None:
    assert redact(f"https://{token}@{host}{path}") == f"https://{host}{path}"


@given(host=HOST, path=PATH, query=SECRET, mark=st.sampled_from("?#"))
def test_a_query_is_redacted_whatever_it_holds(host: str, path: str, query: str, mark: str) -> None:
    assert redact(f"https://{host}{path}{mark}{query}") == f"https://{host}{path}"


@given(host=HOST, path=PATH)
def test_what_holds_no_credential_stays(host: str, path: str) -> None:
    for url in (f"s3://{host}{path}", f"s3://{host}/run@2{path}", path, f"{host}@1{path}"):
        assert redact(url) == url


def test_every_link_of_a_chained_url_is_redacted() -> None:
    assert redact("zip://a.npy::s3://key:hidden@bucket/a.zip?x=hidden") == "zip://a.npy::s3://bucket/a.zip"


def test_a_container_before_the_host_is_not_a_user_name() -> None:
    url = "abfss://container@account.dfs.core.windows.net/run"
    assert redact(f"{url}?sig=hidden") == url
    assert redact("abfss://user:hidden@account.dfs.core.windows.net/run") == "abfss://account.dfs.core.windows.net/run"


def test_nothing_stays_nothing() -> None:
    assert redact(None) is None
