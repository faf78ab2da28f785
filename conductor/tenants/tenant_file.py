"""Tenants in a YAML file:

tenants:
  - name: search
    priority: 0
    models: [demo]
    limits:
      input_tokens_per_minute: 200000
      concurrent_requests: 16
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.errors import ConfigError
from baton.keys.key import TENANT_NAME
from conductor.tenants.tenant import MINUTE_S, Tenant, TenantLimits
from conductor.validate import MAX_SALT_LENGTH

MAX_BYTES = 16 << 20
_INT32 = 2**31

_Count = Annotated[int, Field(ge=1, le=10**12)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _LimitsBody(_Strict):
    requests_per_minute: _Count | None = None
    input_tokens_per_minute: _Count | None = None
    output_tokens_per_minute: _Count | None = None
    concurrent_requests: _Count | None = None
    window_s: float = Field(default=MINUTE_S, ge=1, le=MINUTE_S, strict=False)


class _TenantBody(_Strict):
    name: str = Field(pattern=f"^{TENANT_NAME}$")
    cache_salt: str | None = Field(default=None, min_length=1, max_length=MAX_SALT_LENGTH)
    priority: int = Field(default=0, ge=-_INT32, le=_INT32 - 1)
    models: list[str] | None = Field(default=None, min_length=1)
    max_prompt_tokens: _Count | None = None
    max_output_tokens: _Count | None = None
    limits: _LimitsBody = Field(default_factory=_LimitsBody)
    admin: bool = False


class _FileBody(_Strict):
    tenants: list[_TenantBody]


def read_tenants(path: Path) -> Mapping[str, Tenant]:
    """By name, in the file's order. Raises ConfigError, which says where."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    try:
        body = _FileBody.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, content)}") from None
    tenants: dict[str, Tenant] = {}
    for each in body.tenants:
        if each.name in tenants:
            raise ConfigError(f"{path}: there are two tenants called {each.name!r}")
        tenants[each.name] = _tenant(each)
    return tenants


def _tenant(body: _TenantBody) -> Tenant:
    limits = {field.name: getattr(body.limits, field.name) for field in fields(TenantLimits)}
    return Tenant(
        name=body.name,
        cache_salt=body.cache_salt or body.name,
        priority=body.priority,
        models=None if body.models is None else frozenset(body.models),
        max_prompt_tokens=body.max_prompt_tokens,
        max_output_tokens=body.max_output_tokens,
        limits=TenantLimits(**limits),
        admin=body.admin,
    )


def _explain(error: ValidationError, content: Any) -> str:
    """The first thing that is wrong, with the tenant's name and the field."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = [str(part) for part in first["loc"]]
    if len(place) > 1 and place[1].isdigit():
        number = int(place[1])
        entry = content["tenants"][number]
        name = entry.get("name") if isinstance(entry, dict) else None
        place[:2] = [f"tenant {name!r}" if name else f"tenant number {number + 1}"]
    return f"{': '.join(place) or 'the file'}: {first['msg']}"
