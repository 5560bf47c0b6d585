// Sums over `chunk` rows of each column: an invocation a vec4 of columns and chunk. Run again on its own result (one chunk)
// it gives the whole sum, so the order is fixed.
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
    let col = i % {{ width }}u;
    let chunk = i / {{ width }}u;
    if (chunk >= {{ chunks }}u) {
        return;
    }
    var sum = vec4<f32>();
{% if param_grad %}
    var dot = vec4<f32>();
{% endif %}
    if (col < {{ used }}u) {
        let end = {{ first }}u + min((chunk + 1u) * {{ chunk }}u, {{ rows }}u);
        for (var row = {{ first }}u + chunk * {{ chunk }}u; row < end; row++) {
            let v = x_load(row * x_stride + col);
{% if param_grad %}
            sum += v;
            dot += v * (input_load(row * input_stride + col) - stats_at(row)) * stats_at(stats_stride + row);
{% else %}
            sum += v;
{% endif %}
        }
    }
{% if cols % 4 != 0 %}
    let valid = vec4<u32>(0u, 1u, 2u, 3u) + 4u * col < vec4<u32>({{ cols }}u);
    sum = select(vec4<f32>(), sum, valid);
{% if param_grad %}
    dot = select(vec4<f32>(), dot, valid);
{% endif %}
{% endif %}
    y_store(chunk * y_stride + col, sum);
{% if param_grad %}
    y_store(({{ chunks }}u + chunk) * y_stride + col, dot);
{% endif %}
}
