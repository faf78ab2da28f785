{{/* The flags and variables of the processes. All of them are options of a process's configuration class. */}}

{{/* What --model is: a hub id, or a directory in the pod. Empty for the demo model. */}}
{{- define "baton.modelPath" -}}
{{- $model := .Values.modelArtifacts -}}
{{- $rest := regexReplaceAll "^[a-z]+://" $model.uri "" -}}
{{- if hasPrefix "pvc://" $model.uri -}}
{{- $parts := splitn "/" 2 $rest -}}
/model{{ with $parts._1 }}/{{ trimSuffix "/" . }}{{ end }}
{{- else if hasPrefix "oci://" $model.uri -}}
/model{{ with $model.path }}/{{ trimAll "/" . }}{{ end }}
{{- else -}}
{{ $rest }}
{{- end -}}
{{- end -}}

{{/* The name that clients use. Said to everybody: a hub's cache, or /model, would give another one. */}}
{{- define "baton.modelName" -}}
{{- $model := .Values.modelArtifacts -}}
{{- if $model.name -}}
{{- $model.name -}}
{{- else if $model.uri -}}
{{- $model.uri | trimSuffix "/" | base | regexFind "^[^:@]+" -}}
{{- end -}}
{{- end -}}

{{/* Of every process. With Redis, members find conductors there (BATON_REDIS). */}}
{{- define "baton.commonFlags" -}}
- --log-level={{ .Values.logLevel }}
{{- with include "baton.modelPath" . }}
- --model={{ . }}
{{- end }}
{{- with include "baton.modelName" . }}
- --model-name={{ . }}
{{- end }}
{{- if include "baton.hasRedis" . }}
- --cluster-name={{ .Release.Namespace }}.{{ include "baton.fullname" . }}
{{- end }}
{{- with include "baton.accessFlags" . | trim }}
{{ . }}
{{- end }}
{{- end -}}

{{/* Of workers and stores. */}}
{{- define "baton.memberFlags" -}}
{{ include "baton.commonFlags" . }}
{{- if not (include "baton.hasRedis" .) }}
- --conductor={{ include "baton.fullname" . }}-members:{{ include "baton.internalPort" . }}
{{- end }}
- --node=$(NODE_NAME)
- --advertise=$(POD_IP)
- --dtype={{ .Values.engine.dtype }}
- --block-size={{ .Values.engine.blockSize }}
- --transport={{ .Values.engine.transport }}
- --verify={{ .Values.engine.verify }}
{{- with .Values.metrics.port }}
- --metrics-port={{ . }}
{{- end }}
{{- if .Values.tls.internal.enabled }}
{{- if .Values.metrics.port }}
- --metrics-tls={{ .Values.metrics.tls }}
{{- end }}
- --health-port={{ include "baton.healthPort" (dict "root" .) }}
{{- end }}
{{- end -}}

{{- define "baton.field" -}}
- name: {{ .name }}
  valueFrom: {fieldRef: {fieldPath: {{ .path }}}}
{{- end -}}

{{- define "baton.secret" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .secret }}, key: {{ .key }}}}
{{- end -}}

{{/* The environment of a process: (dict "root" $ "part" .Values.prefill) */}}
{{- define "baton.env" -}}
{{- $values := .root.Values -}}
{{ include "baton.field" (dict "name" "POD_NAME" "path" "metadata.name") }}
{{ include "baton.field" (dict "name" "POD_IP" "path" "status.podIP") }}
{{ include "baton.field" (dict "name" "NODE_NAME" "path" "spec.nodeName") }}
{{ include "baton.secret" (dict "name" "BATON_CLUSTER_TOKEN" "secret" (include "baton.tokenSecret" .root) "key" $values.clusterToken.existingSecretKey) }}
{{- if $values.redis.enabled }}
{{ include "baton.secret" (dict "name" "REDIS_PASSWORD" "secret" (include "baton.redisSecret" .root) "key" "password") }}
- name: BATON_REDIS
  value: redis://:$(REDIS_PASSWORD)@{{ include "baton.fullname" .root }}-redis:6379
{{- else if $values.redis.external.existingSecret }}
{{ include "baton.secret" (dict "name" "BATON_REDIS" "secret" $values.redis.external.existingSecret "key" $values.redis.external.existingSecretKey) }}
{{- else if $values.redis.external.url }}
- name: BATON_REDIS
  value: {{ $values.redis.external.url | quote }}
{{- end }}
{{- if hasPrefix "hf://" $values.modelArtifacts.uri }}
- name: HF_HOME
  value: /model-cache
{{- with $values.modelArtifacts.authSecretName }}
{{ include "baton.secret" (dict "name" "HF_TOKEN" "secret" . "key" $values.modelArtifacts.authSecretKey) }}
{{- end }}
{{- end }}
- name: HOME  # the root file system is read-only
  value: /tmp
{{- with .part.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}
