// An invocation counts the mask of its sample once, unless dy is divided by the count already, and writes `steps` time steps of a vec4 of columns.
// It counts at most `kernels::reduce::COUNTED` steps.
{% include "shared/group" %}
{% include "shared/nan" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
    let col = i % {{ width }}u;
    let run = i / {{ width }}u;
    let sample = run / {{ runs }}u;
    if (sample >= {{ samples }}u) {
        return;
    }
{% if counts %}
    var count = 0.0;
{% if time > block %}
    for (var first = 0u; first < {{ time }}u; first += {{ block }}u) {
        let stop = min(first + {{ block }}u, {{ time }}u);
        var part = 0.0;
        for (var t = first; t < stop; t++) {
            part += mask_at(sample * {{ time }}u + t);
        }
        count += part;
    }
{% else %}
    for (var t = 0u; t < {{ time }}u; t++) {
        count += mask_at(sample * {{ time }}u + t);
    }
{% endif %}
{% endif %}
    var v = vec4<f32>();
    if (col < {{ used }}u) {
        v = dy_load(sample * dy_stride + col){% if counts %} / nan_of(max(count, 1.0), count){% endif %};
    }
    let begin = (run % {{ runs }}u) * {{ steps }}u;
    for (var t = begin; t < min(begin + {{ steps }}u, {{ time }}u); t++) {
        let row = sample * {{ time }}u + t;
        finish(row, col, v * mask_at(row));
    }
}
