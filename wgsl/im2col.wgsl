// Windows of a 1-D convolution: column j C + c of row r is x[source row of tap j, c].
{% include "shared/group" %}
{% include "shared/window" %}

{% if channels % 4 != 0 %}
fn tap(start: vec2<u32>, column: u32) -> f32 {
    let row = source_row(start, column / {{ channels }}u);
    if (column >= {{ cols }}u || row == NOWHERE) {
        return 0.0;
    }
    return x_at(row * x_stride + column % {{ channels }}u);
}
{% endif %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var v = vec4<f32>();
    if (col < {{ used }}u) {
        let start = origin(row);
{% if channels % 4 == 0 %}
        let source = source_row(start, col / {{ channels // 4 }}u);
        if (source != NOWHERE) {
            v = x_load(source * x_stride + col % {{ channels // 4 }}u);
        }
{% else %}
        v = vec4<f32>(tap(start, 4u * col), tap(start, 4u * col + 1u), tap(start, 4u * col + 2u), tap(start, 4u * col + 3u));
{% endif %}
    }
    finish(row, col, v);
}
