"""The OpenAPI document is complete: for those who read it, and for what makes clients of it."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app import examples
from app.evaluations import EvaluationRequest
from app.main import create_app
from app.schemas import GenerationRequest
from tests.conftest import local_settings

OPERATIONS = {  # clients are generated with these names: they stay
    "create_generation": "post /v1/generations",
    "list_generations": "get /v1/generations",
    "get_generation": "get /v1/generations/{id}",
    "cancel_generation": "delete /v1/generations/{id}",
    "watch_generation": "get /v1/generations/{id}/events",
    "get_image": "get /v1/generations/{id}/images/{number}",
    "get_preview": "get /v1/generations/{id}/previews/{number}/{step}",
    "list_models": "get /v1/models",
    "get_model": "get /v1/models/{name}",
    "create_evaluation": "post /v1/evaluations",
    "get_evaluation": "get /v1/evaluations/{id}",
    "cancel_evaluation": "delete /v1/evaluations/{id}",
    "get_evaluation_file": "get /v1/evaluations/{id}/files/{name}",
    "get_status": "get /v1/status",
    "get_webhook_secret": "get /v1/webhooks/secret",
    "check_liveness": "get /livez",
    "check_readiness": "get /readyz",
    "get_metrics": "get /metrics",
}
CLIENT = Path(__file__).parent / "clients" / "typescript"

Operations = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(local_settings(tmp_path_factory.mktemp("data")), "redis://nobody").openapi()


@pytest.fixture
def operations(document: dict[str, Any]) -> Operations:
    return {
        f"{method} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def contents(operation: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of its request and its answers: what there is to show of each media type."""
    yield from operation.get("requestBody", {}).get("content", {}).items()
    for answer in operation["responses"].values():
        yield from answer.get("content", {}).items()


def test_the_names_of_operations_stay(operations: Operations):
    assert {operation["operationId"]: path for path, operation in operations.items()} == OPERATIONS


def test_every_operation_and_parameter_says_what_it_is(operations: Operations):
    for path, operation in operations.items():
        assert operation["summary"], path
        assert operation["description"], path
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), f"{path}: {parameter['name']}"
        assert all(answer["description"] for answer in operation["responses"].values()), path


def test_every_field_of_a_request_says_what_it_is(document: dict[str, Any]):
    for name in ("GenerationRequest", "Guidance", "Lora"):
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            assert schema.get("description"), f"{name}.{field}"


def test_every_request_and_answer_but_files_has_an_example_that_its_schema_allows(
    document: dict[str, Any], operations: Operations
):
    seen = 0
    for path, operation in operations.items():
        for media_type, content in contents(operation):
            if content["schema"].get("format") == "binary":
                continue
            examples = [it["value"] for it in content.get("examples", {}).values()] or [content.get("example")]
            for example in examples:
                assert example is not None, f"{path}: {media_type}"
                Draft202012Validator(content["schema"] | {"components": document["components"]}).validate(example)
                seen += 1
    assert seen > 80


def test_examples_of_requests_are_taken():
    for example in examples.REQUESTS["create_generation"].values():
        request = GenerationRequest.model_validate(example)
        assert not list(request.problems(request.kind))
    for example in examples.REQUESTS["create_evaluation"].values():
        assert EvaluationRequest.model_validate(example).read().prompts


def test_no_field_of_an_answer_may_be_missing(document: dict[str, Any]):
    schemas = document["components"]["schemas"]
    for name in ("Generation", "Parameters", "Image", "GenerationList", "Model", "ModelList", "Evaluation"):
        assert set(schemas[name]["required"]) == set(schemas[name]["properties"]), name


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_typescript_types_made_of_it_are_right(document: dict[str, Any], tmp_path: Path):
    for name in ("package.json", "package-lock.json", "client.ts"):
        shutil.copy(CLIENT / name, tmp_path)
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    installed = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries", "0"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if installed.returncode:
        pytest.skip(f"npm cannot install: {installed.stderr[-300:]}")
    subprocess.run(["npm", "run", "check"], cwd=tmp_path, check=True, timeout=120)
