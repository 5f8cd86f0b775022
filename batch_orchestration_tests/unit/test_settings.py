"""What settings refuse, and that they tell no secret in doing so."""

import pytest
from pydantic import ValidationError

from batch_orchestration.settings import Settings


@pytest.mark.parametrize("name", ["base_url", "dagster_url"])
def test_an_address_that_is_shown_may_hold_no_password_and_the_refusal_does_not_tell_it(name):
    values = {"engine": "simulated", name: "http://bob:s3cret@host:8000/v1"}

    with pytest.raises(ValidationError) as caught:
        Settings(**values, _env_file=None)

    assert "BATCH_API_KEY" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_an_address_with_an_at_sign_in_its_path_is_none_with_a_password():
    settings = Settings(engine="remote", base_url="http://host/models/@me/v1", _env_file=None)

    assert settings.base_url == "http://host/models/@me/v1"
