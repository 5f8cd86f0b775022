"""Settings: the combinations and values that they refuse, without showing a secret."""

import pytest
from pydantic import ValidationError

from batch_orchestration.settings import Settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "remote"}, "BATCH_ENGINE=remote needs BATCH_BASE_URL"),
        ({"alert_email_to": "ops@example.org"}, "BATCH_ALERT_EMAIL_TO needs BATCH_SMTP_HOST"),
        (
            {"silent_seconds": 10},
            "BATCH_SILENT_SECONDS=10 is less than three times BATCH_HEARTBEAT_SECONDS=5",
        ),
        (
            {"max_queued_requests": 10},
            "BATCH_MAX_QUEUED_REQUESTS=10: such a batch would never be admitted",
        ),
        ({"inbox_priorities": {"rejected": 1}}, "'rejected' cannot be a priority folder"),
        ({"inbox_priorities": {"high": 1001}}, "priority 1001 is not within 1000 of 0"),
        ({"engine_env": {"BATCH_MODEL": "m"}}, "BATCH_MODEL: settings are not for the engine"),
        ({"base_url": "http://bob:s3cret@host:8000/v1"}, "a key is for BATCH_API_KEY"),
        ({"dagster_url": "http://bob:s3cret@host:3000"}, "a key is for BATCH_API_KEY"),
    ],
)
def test_an_unusable_setting_is_refused_by_name_and_without_its_secret(values, message):
    with pytest.raises(ValidationError) as caught:
        Settings(**{"engine": "simulated", **values}, _env_file=None)

    assert message in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_an_at_sign_in_the_path_of_an_address_is_no_password():
    settings = Settings(engine="remote", base_url="http://host/models/@me/v1", _env_file=None)

    assert settings.base_url == "http://host/models/@me/v1"
