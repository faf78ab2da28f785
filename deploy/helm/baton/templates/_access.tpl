{{/* Certificates, passwords and keys: flags, and the Secrets that they are read from. All are followed when they change,
so they are mounted whole; a file mounted by itself would never change. */}}

{{- define "baton.internalTlsSecret" -}}
{{- default (printf "%s-internal-tls" (include "baton.fullname" .)) .Values.tls.internal.existingSecret -}}
{{- end -}}

{{- define "baton.clientTlsSecret" -}}
{{- default (printf "%s-tls" (include "baton.fullname" .)) .Values.tls.clients.existingSecret -}}
{{- end -}}

{{/* http or https: how clients reach conductors. */}}
{{- define "baton.scheme" -}}
{{- ternary "https" "http" .Values.tls.clients.enabled -}}
{{- end -}}

{{/* Where workers and stores reach conductors; with TLS of either kind it is a port of its own. Its name: */}}
{{- define "baton.internalPortName" -}}
{{- ternary "internal" "grpc" (or .Values.tls.internal.enabled .Values.tls.clients.enabled) -}}
{{- end -}}

{{- define "baton.internalPort" -}}
{{- ternary 50054 50051 (eq (include "baton.internalPortName" .) "internal") -}}
{{- end -}}

{{/* Where workers and stores tell the kubelet of their health. It has no certificate. */}}
{{- define "baton.healthPort" -}}
{{- ternary 50055 .port .root.Values.tls.internal.enabled -}}
{{- end -}}

{{/* Of every process. */}}
{{- define "baton.accessFlags" -}}
{{- if .Values.tls.internal.enabled }}
- --tls-cert=/etc/baton/tls/tls.crt
- --tls-key=/etc/baton/tls/tls.key
- --tls-ca=/etc/baton/tls/ca.crt
- --tls-peer-name={{ .Values.tls.internal.peerName }}
{{- end }}
{{- $redis := .Values.redis.external }}
{{- with $redis.username }}
- --redis-username={{ . }}
{{- end }}
{{- if $redis.passwordSecret }}
- --redis-password-file=/etc/baton/redis-password/{{ $redis.passwordSecretKey }}
{{- end }}
{{- if $redis.tlsSecret }}
- --redis-ca-file=/etc/baton/redis-tls/ca.crt
{{- if $redis.clientCertificate }}
- --redis-cert-file=/etc/baton/redis-tls/tls.crt
- --redis-key-file=/etc/baton/redis-tls/tls.key
{{- end }}
{{- end }}
{{- end -}}

{{/* Of conductors only. */}}
{{- define "baton.conductorAccessFlags" -}}
{{- if eq (include "baton.internalPortName" .) "internal" }}
- --internal-port={{ include "baton.internalPort" . }}
{{- end }}
{{- if .Values.tls.clients.enabled }}
- --ssl-certfile=/etc/baton/client-tls/tls.crt
- --ssl-keyfile=/etc/baton/client-tls/tls.key
{{- end }}
{{- if .Values.apiKeys.existingSecret }}
- --tenants=/etc/baton/api-keys/tenants.yaml
- --keys={{ ternary "redis" "/etc/baton/api-keys/keys.txt" .Values.apiKeys.inRedis }}
{{- end }}
{{- end -}}

{{/* name: Secret, of what the pods of a part mount at /etc/baton/name: (dict "root" $ "component" "prefill") */}}
{{- define "baton.accessSecrets" -}}
{{- $values := .root.Values -}}
{{- if $values.tls.internal.enabled }}
tls: {{ include "baton.internalTlsSecret" .root }}
{{- end }}
{{- with $values.redis.external.passwordSecret }}
redis-password: {{ . }}
{{- end }}
{{- with $values.redis.external.tlsSecret }}
redis-tls: {{ . }}
{{- end }}
{{- if eq .component "conductor" }}
{{- if $values.tls.clients.enabled }}
client-tls: {{ include "baton.clientTlsSecret" .root }}
{{- end }}
{{- with $values.apiKeys.existingSecret }}
api-keys: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "baton.accessMounts" -}}
{{- range $name, $secret := include "baton.accessSecrets" . | fromYaml }}
- {name: {{ $name }}, mountPath: /etc/baton/{{ $name }}, readOnly: true}
{{- end }}
{{- end -}}

{{- define "baton.accessVolumes" -}}
{{- range $name, $secret := include "baton.accessSecrets" . | fromYaml }}
- {name: {{ $name }}, secret: {secretName: {{ $secret }}, defaultMode: 0440}}
{{- end }}
{{- end -}}

{{/* Combinations that cannot work. */}}
{{- define "baton.checkAccess" -}}
{{- range $name := list "internal" "clients" -}}
{{- $tls := get $.Values.tls $name -}}
{{- if and $tls.enabled (not $tls.existingSecret) (not $tls.issuerRef) -}}
{{- fail (printf "tls.%s.enabled needs tls.%s.existingSecret, or tls.%s.issuerRef of cert-manager" $name $name $name) -}}
{{- end -}}
{{- if and $tls.existingSecret $tls.issuerRef -}}
{{- fail (printf "set one of tls.%s.existingSecret and tls.%s.issuerRef" $name $name) -}}
{{- end -}}
{{- if and (not $tls.enabled) (or $tls.existingSecret $tls.issuerRef) -}}
{{- fail (printf "tls.%s has a certificate and is off: set tls.%s.enabled" $name $name) -}}
{{- end -}}
{{- end -}}
{{- $keys := .Values.apiKeys -}}
{{- if and $keys.inRedis (not (include "baton.hasRedis" .)) -}}
{{- fail "apiKeys.inRedis needs Redis: set redis.enabled or redis.external" -}}
{{- end -}}
{{- if and (not $keys.existingSecret) (or $keys.inRedis $keys.testSecret) -}}
{{- fail "apiKeys needs existingSecret, a Secret with tenants.yaml (and keys.txt unless inRedis)" -}}
{{- end -}}
{{- $redis := .Values.redis.external -}}
{{- if and (or $redis.username $redis.passwordSecret $redis.tlsSecret) (not (or $redis.url $redis.existingSecret)) -}}
{{- fail "redis.external has a user, a password or a certificate, and no url" -}}
{{- end -}}
{{- if and $redis.tlsSecret $redis.url (not (hasPrefix "rediss://" $redis.url)) -}}
{{- fail "redis.external.tlsSecret is for TLS: write redis.external.url as rediss://host:port" -}}
{{- end -}}
{{- if and $redis.clientCertificate (not $redis.tlsSecret) -}}
{{- fail "redis.external.clientCertificate needs redis.external.tlsSecret" -}}
{{- end -}}
{{- end -}}
