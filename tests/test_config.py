"Settings: what they accept, and the line that a wrong one gets."
from dataclasses import FrozenInstanceError
from typing import Annotated, Literal

import pytest
from pydantic import Field

from cryptopredict.config import ConfigError, settings


@settings
class Brew:
    cups: Annotated[int, Field(ge=1, le=12, strict=True)] = 4
    strength: Annotated[float, Field(ge=0., le=1., strict=True)] = .5
    kind: Literal["filter", "moka"] = "filter"


@pytest.mark.parametrize("given, message", [
    (dict(cups=0), "key 'cups' is 0: must be a whole number from 1 to 12"),
    (dict(cups=True), "key 'cups' is True: must be a whole number from 1 to 12"),
    (dict(cups="4"), "key 'cups' is '4': must be a whole number from 1 to 12"),
    (dict(strength=2.), "key 'strength' is 2.0: must be a number from 0.0 to 1.0"),
    (dict(kind="tea"), "key 'kind' is 'tea': must be one of filter, moka"),
    (dict(sugar=1), "key 'sugar': unknown key; known are cups, strength, kind"),
])
def test_a_wrong_setting_gets_one_line_that_names_it(given, message):
    with pytest.raises(ConfigError) as error: Brew(**given)
    assert str(error.value) == message and error.value.owner is Brew


def test_a_whole_number_is_accepted_as_a_float():
    assert Brew(cups=2, strength=1) == Brew(cups=2, strength=1.)


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError): Brew().cups = 2
