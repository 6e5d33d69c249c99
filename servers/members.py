"""Makes accounts on a team's MLflow server, or new passwords for them: `python members.py NAME...`, as administrator.

A member may read everything, and add runs and versions of models to what others have created. An account that is not a
member only reads, since that is default_permission in basic_auth.ini.
"""

import os
import secrets
import sys

from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient

ROLE = "member"


def member_role(client: AuthServiceClient) -> int:
    """The id of the role, which is created if it is new."""
    for role in client.list_roles("default"):
        if role.name == ROLE:
            return int(role.id)
    role = client.create_role("default", ROLE)
    for kind in ("experiment", "registered_model"):
        client.add_role_permission(role.id, kind, "*", "EDIT")
    return int(role.id)


def main(names: list[str]) -> None:
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", "admin")
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", ""))
    client = AuthServiceClient(os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000"))
    role = member_role(client)
    for name in names:
        password = secrets.token_urlsafe(12)
        try:
            client.create_user(name, password)
            client.assign_role(name, role)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            client.update_user_password(name, password)
        print(name, password)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MlflowException as error:
        sys.exit(f"members.py: {error}; MLFLOW_TRACKING_USERNAME and _PASSWORD must be an administrator's")
