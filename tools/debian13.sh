#!/usr/bin/env bash
# Run a command in this checkout, in a Debian 13 root (Python 3.13), as root:
#
#   tools/debian13.sh make test-newest NEWEST=python3
#
# DEBIAN13 is the root's directory, made with debootstrap where it is not there; MIRROR is
# debootstrap's mirror. The root takes this machine's names, certificates and pip configuration.
set -euo pipefail
if [ -z "${OWN_MOUNTS:-}" ]; then # they end with the command
  OWN_MOUNTS=1 exec unshare --mount "$0" "$@"
fi
checkout=$(cd "$(dirname "$0")/.." && pwd)
root=${DEBIAN13:-/var/tmp/dcod_jax-debian13}
packages=python3,python3-venv,python3-dev,ca-certificates,git,make,gcc

if [ ! -e "$root/complete" ]; then
  debootstrap --variant=minbase --include=$packages trixie "$root" ${MIRROR:+"$MIRROR"} >&2
  touch "$root/complete"
fi
for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
  if [ -e "$file" ]; then cp -L "$file" "$root$file"; fi
done
mkdir -p "$root$checkout"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$checkout" "$root$checkout"
exec chroot "$root" /usr/bin/env -C "$checkout" PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
