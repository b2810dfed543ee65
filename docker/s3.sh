#!/bin/sh
# The S3 store of compose.yaml: one account, whose keys come from the environment and are on no command line.
set -eu
umask 077
cat > /tmp/s3.json <<END
{"identities": [{"name": "bmfm", "credentials": [{"accessKey": "$S3_ACCESS_KEY", "secretKey": "$S3_SECRET_KEY"}],
  "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
END
exec weed server -dir=/data -ip=s3 -ip.bind=0.0.0.0 -volume.max=0 -master.volumeSizeLimitMB=1024 -s3 -s3.port=8333 -s3.config=/tmp/s3.json
