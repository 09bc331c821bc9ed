"""The lists of models, on both interfaces, over a real socket."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from tests.server.engines import MODEL, STAND_IN, EngineUnderTest

SEARCH = "/client/v4/accounts/local/ai/models/search"


def search(engine: EngineUnderTest, **query: Any) -> dict[str, Any]:
    response = engine.client.get(SEARCH, params=query)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    assert (body["success"], body["errors"], body["messages"]) == (True, [], [])
    return body


def names(body: dict[str, Any]) -> list[str]:
    return [model["name"] for model in body["result"]]


def test_every_name_is_a_model(engine: EngineUnderTest) -> None:
    body = search(engine, include_deprecated=True)
    assert names(body) == [MODEL, STAND_IN]
    assert body["result_info"] == {"count": 2, "page": 1, "per_page": 20, "total_count": 2, "total_pages": 1}
    for model in body["result"]:
        assert uuid.UUID(model["id"])
        assert model["task"]["name"] == "Text Generation"
        assert {"property_id": "context_window", "value": "8192"} in model["properties"]
    assert len({model["id"] for model in body["result"]}) == 2
    assert search(engine)["result"] == body["result"], "the ids stay"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"search": "MISTRAL"}, [STAND_IN]),
        ({"search": "llama"}, []),
        ({"author": "mistral"}, [STAND_IN]),
        ({"task": "Text Generation"}, [MODEL, STAND_IN]),
        ({"task": "Translation"}, []),
        ({"per_page": 1, "page": 2}, [STAND_IN]),
        ({"per_page": 1, "page": 3}, []),
    ],
)
def test_a_search(engine: EngineUnderTest, query: dict[str, Any], expected: list[str]) -> None:
    assert names(search(engine, **query)) == expected


@pytest.mark.parametrize(
    "query", [{"page": 0}, {"page": "two"}, {"per_page": 101}, {"per_page": "9" * 5000}, {"format": "openrouter"}]
)
def test_a_search_that_is_wrong(engine: EngineUnderTest, query: dict[str, Any]) -> None:
    response = engine.client.get(SEARCH, params=query)
    (error,) = response.json()["errors"]
    assert (response.status_code, error["code"]) == (400, 5006)
    assert next(iter(query)) in error["message"]


@pytest.mark.parametrize("root", ["/v1", "/client/v4/accounts/local/ai/v1"])
def test_openais_list(engine: EngineUnderTest, root: str) -> None:
    body = engine.client.get(f"{root}/models").json()
    assert body["object"] == "list"
    assert [(model["id"], model["parent"]) for model in body["data"][:2]] == [(MODEL, None), (STAND_IN, MODEL)]
    assert {model["root"] for model in body["data"]} == {MODEL}
    assert {model["max_model_len"] for model in body["data"]} == {8192}
    for name in (MODEL, STAND_IN, "embedded", STAND_IN.replace("/", "%2F")):
        one = engine.client.get(f"{root}/models/{name}").json()
        assert (one["object"], one["root"]) == ("model", MODEL)
    unknown = engine.client.get(f"{root}/models/gpt-4o")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
