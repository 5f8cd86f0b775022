"""The web server's GraphQL, asked as the UI asks it."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOCATION = "batch_orchestration"
ENDED = frozenset({"SUCCESS", "FAILURE", "CANCELED"})


@dataclass(frozen=True)
class Run:
    """A run as GraphQL tells it."""

    run_id: str
    job: str
    status: str
    tags: dict[str, str]

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class DagsterClient:
    """What a person does in the UI of a web server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        assert "errors" not in answer, answer["errors"]
        data: dict[str, Any] = answer["data"]
        return data

    def runs(self, job: str | None = None, **tags: str) -> list[Run]:
        """The newest runs first."""
        query = """query($filter: RunsFilter) { runsOrError(filter: $filter, limit: 200) {
            ... on Runs { results { runId status jobName tags { key value } } } } }"""
        filter_ = {"tags": [{"key": key, "value": value} for key, value in tags.items()]}
        if job is not None:
            filter_["pipelineName"] = job  # type: ignore[assignment]
        results = self.graphql(query, filter=filter_)["runsOrError"]["results"]
        return [
            Run(
                run_id=run["runId"],
                job=run["jobName"],
                status=run["status"],
                tags={tag["key"]: tag["value"] for tag in run["tags"]},
            )
            for run in results
        ]

    def launch(
        self,
        job: str,
        *,
        run_config: Mapping[str, Any] | None = None,
        asset: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Launch a run as the UI does; return its id."""
        query = """mutation($params: ExecutionParams!) { launchPipelineExecution(
            executionParams: $params) { __typename ... on LaunchRunSuccess { run { runId } }
            ... on PythonError { message } ... on RunConfigValidationInvalid { errors { message } }
        } }"""
        selector = {
            "repositoryLocationName": LOCATION,
            "repositoryName": "__repository__",
            "pipelineName": job,
            "assetSelection": [{"path": [asset]}] if asset else None,
        }
        params = {
            "selector": selector,
            "runConfigData": json.dumps(run_config or {}),
            "executionMetadata": {
                "tags": [{"key": key, "value": value} for key, value in (tags or {}).items()]
            },
        }
        answer = self.graphql(query, params=params)["launchPipelineExecution"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        run_id: str = answer["run"]["runId"]
        return run_id

    def backfill(self, asset: str, partitions: list[str]) -> str:
        """Launch a backfill of partitions as the UI does; return its id."""
        query = """mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(
            backfillParams: $params) { __typename ... on LaunchBackfillSuccess { backfillId }
            ... on PythonError { message } } }"""
        params = {"assetSelection": [{"path": [asset]}], "partitionNames": partitions}
        answer = self.graphql(query, params=params)["launchPartitionBackfill"]
        assert answer["__typename"] == "LaunchBackfillSuccess", answer
        backfill_id: str = answer["backfillId"]
        return backfill_id

    def terminate(self, run_id: str) -> None:
        """Terminate a run as the UI does."""
        query = "mutation($id: String!) { terminateRun(runId: $id) { __typename } }"
        answer = self.graphql(query, id=run_id)["terminateRun"]
        assert answer["__typename"] == "TerminateRunSuccess", answer

    def execute_again(self, run_id: str) -> str:
        """Re-execute all of a run as the UI does; return the new run's id."""
        query = """mutation($params: ReexecutionParams) { launchRunReexecution(
            reexecutionParams: $params) { __typename ... on LaunchRunSuccess { run { runId } }
            ... on PythonError { message } } }"""
        params = {"parentRunId": run_id, "strategy": "ALL_STEPS"}
        answer = self.graphql(query, params=params)["launchRunReexecution"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        new_run_id: str = answer["run"]["runId"]
        return new_run_id

    def backfill_status(self, backfill_id: str) -> str:
        query = """query($id: String!) { partitionBackfillOrError(backfillId: $id) {
            ... on PartitionBackfill { status } } }"""
        status: str = self.graphql(query, id=backfill_id)["partitionBackfillOrError"]["status"]
        return status

    def partitions(self, asset: str) -> dict[str, set[str]]:
        """Keys of an asset's partitions by status: materialized, failed, materializing, missing.

        There are none while the web server has not loaded the code again.
        """
        query = """query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) {
            ... on AssetNode { partitionKeys assetPartitionStatuses {
            ... on DefaultPartitionStatuses { materializedPartitions failedPartitions
            materializingPartitions unmaterializedPartitions } } } } }"""
        node = self.graphql(query, key={"path": [asset]})["assetNodeOrError"]
        statuses = node.get("assetPartitionStatuses", {})
        return {
            "materialized": set(statuses.get("materializedPartitions", ())),
            "failed": set(statuses.get("failedPartitions", ())),
            "materializing": set(statuses.get("materializingPartitions", ())),
            "missing": set(statuses.get("unmaterializedPartitions", ())),
        }

    def switch_sensor(self, name: str, *, on: bool) -> None:
        """Turn a sensor on or off, as the toggle in the UI does."""
        selector = {
            "repositoryLocationName": LOCATION,
            "repositoryName": "__repository__",
            "sensorName": name,
        }
        if on:
            query = """mutation($selector: SensorSelector!) {
                startSensor(sensorSelector: $selector) { __typename } }"""
            answer = self.graphql(query, selector=selector)["startSensor"]
            assert answer["__typename"] == "Sensor", answer
            return
        query = """query($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) {
            ... on Sensor { sensorState { id status ticks(limit: 1) { status } } } } }"""
        stop = "mutation($id: String!) { stopSensor(id: $id) { __typename } }"
        while True:
            state = self.graphql(query, selector=selector)["sensorOrError"]["sensorState"]
            if state["status"] == "RUNNING":
                answer = self.graphql(stop, id=state["id"])["stopSensor"]
                assert answer["__typename"] == "StopSensorMutationResult", answer
            elif "STARTED" not in [tick["status"] for tick in state["ticks"]]:
                return
            # A tick that began before writes the sensor's state as it was, which turns it on again.
            time.sleep(0.5)

    def latest_tick(self, sensor: str) -> str:
        """Why the sensor skipped its latest tick; empty if it did not skip."""
        query = """query($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) {
            ... on Sensor { sensorState { ticks(limit: 1) { skipReason } } } } }"""
        selector = {
            "repositoryLocationName": LOCATION,
            "repositoryName": "__repository__",
            "sensorName": sensor,
        }
        state = self.graphql(query, selector=selector)["sensorOrError"]["sensorState"]
        return state["ticks"][0]["skipReason"] or ""
