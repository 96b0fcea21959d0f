#!/bin/sh
# agent PORT: runs what comes over a virtio console, one command after another.
#
#   asked:     NUMBER SCRIPT                        (base64)
#   answered:  NUMBER CODE STDOUT STDERR .          (base64, a line; "-" for nothing)
#
# A line may be lost where connections end and begin. So who waits asks again, and what was answered is not run twice.
exec 3<>"$1"
last=
while :; do
    if ! read -r number script <&3; then
        sleep 0.1 # nobody has the other end open
        continue
    fi
    [ -n "$script" ] || continue
    if [ "$number" != "$last" ]; then
        echo "$script" | base64 -d >/run/agent.script
        sh /run/agent.script >/run/agent.stdout 2>/run/agent.stderr </dev/null 3>&-
        code=$?
        stdout=$(base64 </run/agent.stdout | tr -d '\n') stderr=$(base64 </run/agent.stderr | tr -d '\n')
        last=$number
    fi
    echo "$number $code ${stdout:--} ${stderr:--} ." >&3
done
