"""The pages at `/` and `/docs`: files, from memory, and what they show. No decisions."""

from collections.abc import Iterator
from hashlib import sha256
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from maestro_core.artifact import Manifest
from server.errors import NotFoundError
from server.http import Json

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_INDEX = "index.html"
_DOCS = "docs.html"
_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "png": "image/png",
    "txt": "text/plain",
    "LICENSE": "text/plain",
    "NOTICE": "text/plain",
}
# Vendored files carry their version in their path; ours are asked for anew, and mostly unchanged.
_VENDORED = ("uplot-", "swagger-ui-")
_FOREVER = "public, max-age=31536000, immutable"
_ANEW = "no-cache"
_EXAMPLES = "examples/"


class _File(NamedTuple):
    body: bytes
    media_type: str
    headers: dict[str, str]


def page(manifest: Manifest) -> APIRouter:
    """Return the page, its files, `/page.json` (the model that it shows), and the API's `/docs`."""
    router = APIRouter(include_in_schema=False)
    found = _read(resources.files("server") / "static")
    files = {name: _file(name, body) for name, body in found if _suffix(name) in _TYPES}
    model = _model(manifest, files)

    def answer(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFoundError(f"there is no file '{name}'")
        body, media_type, headers = files[name]
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=media_type)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return answer(request, _INDEX)

    @router.api_route("/docs", methods=["GET", "HEAD"])
    async def docs(request: Request) -> Response:
        return answer(request, _DOCS)

    @router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
    async def static(request: Request, name: str) -> Response:
        return answer(request, name)

    @router.get("/page.json")
    async def described() -> Response:
        return Json(model)

    return router


def _read(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield the path below `folder` and the bytes of each of its files."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _read(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry.read_bytes()


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2]


def _file(name: str, body: bytes) -> _File:
    cache = _FOREVER if name.startswith(_VENDORED) else _ANEW
    tag = f'"{sha256(body).hexdigest()[:16]}"'
    return _File(body, _TYPES[_suffix(name)], {**_HEADERS, "Cache-Control": cache, "ETag": tag})


def _model(manifest: Manifest, files: dict[str, _File]) -> dict[str, Any]:
    """Return what the page says of the model; example pictures are those of what it can name."""
    image = manifest.input.image
    named = manifest.labels if image is not None and manifest.labels is not None else ()
    examples = {f"{_EXAMPLES}{label}.png" for label in named} & files.keys()
    return {
        "name": manifest.name,
        "version": manifest.version,
        "metric": manifest.metric.name,
        "data": manifest.metric.data_set,
        "shape": manifest.input.shape,
        "takes_pictures": image is not None,
        "examples": [f"/static/{name}" for name in sorted(examples)],
    }
