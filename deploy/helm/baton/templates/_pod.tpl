{{/* What the pods of all parts have in common. Each takes (dict "root" $ "component" NAME "part" .Values.NAME). */}}

{{/* Without the chart's version: a new chart that changes nothing of a pod must not restart it. */}}
{{- define "baton.podMetadata" -}}
labels:
  {{- include "baton.selectorLabels" . | nindent 2 }}
  {{- with .part.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .part.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Everything but containers and volumes. */}}
{{- define "baton.podSpec" -}}
serviceAccountName: {{ include "baton.serviceAccountName" .root }}
automountServiceAccountToken: false  # nothing here talks to Kubernetes
# Kubernetes would set BATON_PORT and the like for Services, and the processes would take them for options.
enableServiceLinks: false
securityContext:
  {{- mergeOverwrite (deepCopy .root.Values.podSecurityContext) .part.podSecurityContext | toYaml | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .part.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- if .part.hostIPC }}
hostIPC: true
{{- end }}
{{- if .part.hostPID }}
hostPID: true
{{- end }}
{{- with include "baton.placement" . | trim }}
{{ . }}
{{- end }}
{{- end -}}

{{- define "baton.placement" -}}
{{- with .part.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $selector := dict "matchLabels" (include "baton.selectorLabels" . | fromYaml) }}
{{- with .part.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{ merge (dict) . (dict "labelSelector" $selector) | toYaml | nindent 4 | trim }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Image, rights and environment of the container. */}}
{{- define "baton.container" -}}
{{ include "baton.image" . }}
securityContext:
  {{- mergeOverwrite (deepCopy .root.Values.securityContext) .part.securityContext | toYaml | nindent 2 }}
env:
  {{- include "baton.env" . | nindent 2 }}
{{- end -}}

{{- define "baton.volumeMounts" -}}
{{- $uri := .root.Values.modelArtifacts.uri -}}
- {name: tmp, mountPath: /tmp}
{{- include "baton.accessMounts" . }}
{{- if hasPrefix "hf://" $uri }}
- {name: model-cache, mountPath: /model-cache}
{{- else if or (hasPrefix "pvc://" $uri) (hasPrefix "oci://" $uri) }}
- {name: model, mountPath: /model, readOnly: true}
{{- end }}
{{- with .part.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "baton.volumes" -}}
{{- $model := .root.Values.modelArtifacts -}}
- {name: tmp, emptyDir: {}}
{{- include "baton.accessVolumes" . }}
{{- if hasPrefix "hf://" $model.uri }}
- name: model-cache
  {{- if $model.cache.claimName }}
  persistentVolumeClaim: {claimName: {{ $model.cache.claimName }}}
  {{- else if $model.cache.hostPath }}
  hostPath: {path: {{ $model.cache.hostPath }}, type: Directory}
  {{- else }}
  emptyDir: {sizeLimit: {{ $model.cache.size }}}
  {{- end }}
{{- else if hasPrefix "pvc://" $model.uri }}
- name: model
  persistentVolumeClaim:
    claimName: {{ (splitn "/" 2 (trimPrefix "pvc://" $model.uri))._0 }}
    readOnly: true
{{- else if hasPrefix "oci://" $model.uri }}
- name: model
  image: {reference: {{ trimPrefix "oci://" $model.uri | quote }}, pullPolicy: IfNotPresent}
{{- end }}
{{- with .part.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Probes over gRPC: (dict "root" $ "port" 50052), or at the port that is for probes alone. The server listens when the weights are loaded; `live` is SERVING from
then on, the server as a whole since the process has registered with a conductor and until it drains. */}}
{{- define "baton.grpcProbes" -}}
{{- $port := include "baton.healthPort" . -}}
startupProbe:
  grpc: {port: {{ $port }}, service: live}
  periodSeconds: 5
  failureThreshold: {{ div (add .root.Values.startupTimeoutSeconds 4) 5 }}
readinessProbe:
  grpc: {port: {{ $port }}}
  periodSeconds: 5
  timeoutSeconds: 3
livenessProbe:
  grpc: {port: {{ $port }}, service: live}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{- define "baton.disruptionBudget" }}
{{- if .part.podDisruptionBudget.enabled }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  maxUnavailable: {{ .part.podDisruptionBudget.maxUnavailable }}
  selector:
    matchLabels:
      {{- include "baton.selectorLabels" . | nindent 6 }}
{{- end }}
{{- end -}}
