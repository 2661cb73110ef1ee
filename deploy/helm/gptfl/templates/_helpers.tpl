{{/* The name of what a release makes: the release's, which stands for one coordinator or one silo. */}}
{{- define "gptfl.name" -}}
{{- .Release.Name | trunc 48 | trimSuffix "-" -}}
{{- end -}}

{{- define "gptfl.selector" -}}
app.kubernetes.io/name: gptfl
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: {{ .Values.role }}
{{- end -}}

{{- define "gptfl.labels" -}}
{{ include "gptfl.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "gptfl.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "gptfl.claim" -}}
{{ .Values.persistence.existingClaim | default (include "gptfl.name" .) }}
{{- end -}}

{{/* The file that the role reads. */}}
{{- define "gptfl.file" -}}
{{ if eq .Values.role "coordinator" }}federation.yaml{{ else }}silo.yaml{{ end }}
{{- end -}}

{{/* What every container may do: nothing but run. */}}
{{- define "gptfl.container" -}}
image: {{ include "gptfl.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
resources: {{- toYaml .Values.resources | nindent 2 }}
{{- with .Values.env }}
env: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "gptfl.mounts" -}}
- {name: state, mountPath: /var/lib/gptfl}
- {name: file, mountPath: /etc/gptfl, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
{{- if .Values.data.existingClaim }}
- {name: data, mountPath: /data, readOnly: true}
{{- end }}
{{- end -}}
