"""The page over HTTP: types, caching, policy, and that it needs nobody else."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from maestro_core.artifact import Artifact
from server.app import create_app
from server.page import page
from server.settings import Settings
from tests.conftest import tiny_manifest

STATIC = Path(__file__).parents[1] / "server" / "static"
EXAMPLES = STATIC / "examples"


@pytest.fixture
def client(tiny_artifact: Artifact, tmp_path: Path) -> TestClient:
    """Return a client of a server that has not measured its host: the page is there already."""
    return TestClient(create_app(Settings(artifact=tiny_artifact.path, state_dir=tmp_path)))


@pytest.mark.parametrize(
    ("path", "media_type", "cache"),
    [
        ("/", "text/html", "no-cache"),
        ("/static/page.js", "text/javascript", "no-cache"),
        ("/static/page.css", "text/css", "no-cache"),
        ("/static/icon.svg", "image/svg+xml", "no-cache"),
        ("/static/uplot-1.6.32/uPlot.iife.min.js", "text/javascript", "immutable"),
        ("/static/uplot-1.6.32/LICENSE", "text/plain", "immutable"),
        ("/docs", "text/html", "no-cache"),
        ("/static/swagger-ui-5.35.0/swagger-ui-bundle.js", "text/javascript", "immutable"),
        ("/static/swagger-ui-5.35.0/LICENSE", "text/plain", "immutable"),
    ],
)
def test_files_say_their_type_and_how_long_they_hold(
    client: TestClient, path: str, media_type: str, cache: str
) -> None:
    first = client.get(path)
    again = client.get(path, headers={"if-none-match": first.headers["etag"]})

    assert first.headers["content-type"].startswith(media_type)
    assert cache in first.headers["cache-control"]
    assert "default-src 'none'" in first.headers["content-security-policy"]
    assert (again.status_code, again.content) == (304, b"")
    assert client.head(path).headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize("path", ["/static/no.js", "/static/../page.py", "/static/%2e%2e/page.py"])
def test_nothing_else_is_given_away(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_needs_no_other_host_and_no_inline_script() -> None:
    ours = [file for file in STATIC.iterdir() if file.suffix in (".html", ".css", ".js")]

    for file in ours:
        assert not re.search(r"https?://|[\"'(]//", file.read_text()), file.name
    for page_file in STATIC.glob("*.html"):
        text = page_file.read_text()
        assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=|<style", text)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_what_a_page_asks_for_is_there(client: TestClient, path: str) -> None:
    asked = re.findall(r'(?:src|href)="(/static/[^"]+)"', client.get(path).text)

    assert asked
    for file in asked:
        assert client.get(file).status_code == 200, file


def test_example_pictures_are_those_of_what_the_model_can_name() -> None:
    picture = min(EXAMPLES.glob("*.png"))
    app = FastAPI()
    app.include_router(page(replace(tiny_manifest(), labels=(*"abcdefghi", picture.stem))))

    examples = TestClient(app).get("/page.json").json()["examples"]

    assert examples == [f"/static/examples/{picture.name}"]
