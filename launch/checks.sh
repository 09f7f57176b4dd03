# shellcheck shell=bash
# What the launch scripts check before they start anything; they source this file. Each check ends the script with one
# line on stderr and status 2. Nothing from the environment is read as arithmetic before it is known to be a number:
# bash runs commands that it finds there.

refuse() {
  echo "$1" >&2
  exit 2
}

# check_count NAME...: whole numbers of at least 1.
check_count() {
  local name
  for name in "$@"; do
    [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]] || refuse "$name: expected a whole number of at least 1, got '${!name}'"
  done
}

# check_port: MASTER_PORT.
check_port() {
  if [[ ! $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((MASTER_PORT > 65535)); then
    refuse "MASTER_PORT: expected a port from 1 to 65535, got '$MASTER_PORT'"
  fi
}

# check_port_free: nobody on this machine listens at MASTER_PORT.
check_port_free() {
  if (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; then
    refuse "MASTER_PORT: expected a port that is free on this machine, something listens at $MASTER_PORT"
  fi
}
